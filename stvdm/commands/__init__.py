# SPDX-License-Identifier: Apache-2.0
"""The commands of `stvdm`, a file each: `add` tells argparse its options, `run` does it."""
