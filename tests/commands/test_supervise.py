# SPDX-License-Identifier: Apache-2.0
"""What `stvdm supervise` passes on."""

from stvdm import cli


def test_supervise_passes_everything_on_and_leaves_with_its_status(stand_in):
    noted = []
    stand_in("stvdm.train.supervisor", supervise=lambda *args, **kwargs: noted.append((args, kwargs)) or 75)
    command = ["stvdm", "train", "dit", "--config=c.py", "--config.a.b=1", "--", "x"]
    assert cli.main([*"supervise --processes=2 --timeout-s 60 --max-failures=3 --".split(), *command]) == 75
    assert noted == [
        ((command,), {"processes": 2, "chip": None, "timeout": 60, "grace": 120, "max_failures": 3}),
    ]
