"""How layers are run, which is another thing than what they compute."""

from swat_lm.model.execution.layer_loop import (
    check_chunk,
    check_goes_on,
    is_hooked,
    run_layers,
    step_layers,
    stepped_over,
)

__all__ = ["check_chunk", "check_goes_on", "is_hooked", "run_layers", "step_layers", "stepped_over"]
