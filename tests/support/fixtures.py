"""The types of fixtures that are functions."""

from collections.abc import Callable

from tests.support.service_process import Service

StartService = Callable[..., Service]  # it takes what `Service` takes
Figures = Callable[[str, str], None]  # it takes a fault and what was seen of it
