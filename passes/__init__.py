"""The rewrites that turn a captured denoiser into the variant of one schedule row, in the order they run."""

if __name__ != "dcc.passes":
    raise ImportError("import dcc.passes; a bare `passes` is not part of dcc's interface")

from dcc.passes.base import Pass
from dcc.passes.drop_asserts import DropAsserts
from dcc.passes.drop_dead_nodes import DropDeadNodes
from dcc.passes.hoist_invariants import HoistInvariants
from dcc.passes.insert_cache_reads import InsertCacheReads
from dcc.passes.insert_cache_writes import InsertCacheWrites
from dcc.passes.insert_correctors import InsertCorrectors
from dcc.passes.insert_forecasts import InsertForecasts
from dcc.passes.insert_guidance import InsertGuidance
from dcc.passes.insert_measures import InsertMeasures
from dcc.passes.refresh_tokens import RefreshTokens

PASSES: tuple[Pass, ...] = (
    DropAsserts(),  # first: an assertion counts as a use and would keep forecast-over work alive
    InsertCorrectors(),  # before the writes: corrected sites are written relative to their maps
    InsertCacheWrites(),  # before the reads: a residual's base may itself be replaced by a read
    RefreshTokens(),  # before the reads: a refreshed value then becomes its forecast wherever it is named
    InsertCacheReads(),  # every use of a forecast site now reads its anchors
    InsertGuidance(),  # behind the reads: the output that it joins may itself be forecast
    InsertMeasures(),  # behind the reads: a drafted forecast that is compared with the truth is one more read
    InsertForecasts(),  # after all reads stand, so that Inductor sees plain arithmetic only
    HoistInvariants(),  # behind all that names a node: sites, bases and maps may stand on what no step changes
    DropDeadNodes(),  # last: what the reads made dead is the work that is saved
)
