"""Plans: which way a recursion is run on a device, what it costs, and why it was chosen.

    device.py    what a device can do: units, memory, rates (published, or measured for a CPU)
    count.py     FLOPs and bytes of a net call, stage by stage
    launch.py    Work, LaunchPlan and LaunchPlan.pick, the one selector
    cost.py      recurx.cost: every plan with its predicted time
    cpu.py, eager.py, ...   one file a backend: its candidates, and the kinds that do not fit

Kernels hold no thresholds: a plan's settings say every size of a launch.
"""

from recurx.plan.cost import Costs, cost
from recurx.plan.device import DEVICES, Device
from recurx.plan.launch import LaunchPlan, Work

__all__ = ["DEVICES", "Costs", "Device", "LaunchPlan", "Work", "cost"]
