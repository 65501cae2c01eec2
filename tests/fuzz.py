"""How many mutated files the tests of checkpoints try: ``ANNCVT_FUZZ`` times the usual number."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("ANNCVT_FUZZ", "1"))


def fuzz(examples: int) -> settings:
    """A decorator like ``hypothesis.settings``."""
    return settings(
        max_examples=examples * TIMES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
