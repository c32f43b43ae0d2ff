# SPDX-License-Identifier: Apache-2.0
"""Diffusion as functions of functions: a velocity `(x, t) -> dx/dt` is made, guided, pinned and followed.

    velocity = flow.velocity_field(network, objective=objective)                  # whatever the network was trained on
    guided = guidance.classifier_free(velocity, unprompted, scale=6.0, interval=(0.1, 0.9))
    pinned = guidance.keep_known(guided, known_Bthwz, mask_Bthw1)
    latent = samplers.sample(pinned, start, schedules.shifted(50, shift=3.0), sampler=samplers.unipc())

Nothing here knows of a model or of data: arrays have a leading batch axis and any axes after it.
"""
