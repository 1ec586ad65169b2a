"""Every error that dcc raises on purpose. Each message says what is wrong, where, and what to do about it."""


class DccError(Exception):
    """Base of all dcc errors; catching it catches every deliberate refusal."""


class ArgumentError(DccError):
    """An argument of a public function that has a wrong type or value."""


class CaptureError(DccError):
    """The denoiser's inputs or its graph cannot be captured."""


class SiteError(DccError):
    """A site name that this denoiser does not have."""


class PolicyError(DccError):
    """An unknown policy, or a parameter that the policy does not take."""


class SettingError(PolicyError):
    """A policy asks for something of the denoiser that is not at hand, because nothing was captured yet."""


class PlanError(DccError):
    """A plan file or plan value that is malformed, or that belongs to another model or run."""


class PromptError(DccError):
    """Calibration prompts that are missing or of the wrong type."""


class BudgetError(DccError):
    """A budget that is no number, or that no plan can keep."""


class PipelineError(DccError):
    """The object given to dcc is not a pipeline or module that can be compiled in its present state."""


class AlreadyCompiledError(PipelineError):
    """The pipeline or module is already compiled by dcc."""


class PeerCacheError(PipelineError):
    """Another library's cache or patch is active on the denoiser."""


class PositionError(DccError):
    """A denoiser call whose noise level is not among the plan's levels."""


class PassError(DccError):
    """A compiler pass produced or received a graph that breaks the invariants of passes/README.md."""


class KernelError(DccError):
    """Tensors that a kernel cannot take, or a kernel that cannot run here."""


class LoweringError(DccError):
    """A backend that does not exist, or a variant that no backend could run."""


class OptionError(DccError):
    """A DCC_* environment variable with a bad value."""


class DemoError(DccError):
    """An embedded pipeline, split or option of the demo that does not exist."""


class ProfileError(DccError):
    """A profile or calibration checkpoint that is malformed or belongs to another model or run, or a run that cannot
    be calibrated."""
