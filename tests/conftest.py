"""What all tests share: no example of a property is judged by the time that it took."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A machine that is busy with something else may take any time for an example or for its draw.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
