"""Settings shared by all tests: one thread (several are far slower when the machine is busy), no network,
float64 checks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# A shared machine can stall for a second at any moment, so an example has no deadline; examples are
# derandomized so that a green run today is a green run tomorrow. HYPOTHESIS_PROFILE=explore searches anew
# every time.
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "explore", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
