"""The rewrites that turn a captured denoiser into programs; PASSES lists all of them, in the order they run.

Each pass has a stage. Passes of stage "sites" run once per plan and rewrite which sites are cached; those of "variant"
run once per row of the schedule and rewrite a copy of the captured graph; those of "lowering" run once per variant and
shape, on the way to Inductor.
"""

if __name__ != "dcc.passes":
    raise ImportError("import dcc.passes; a bare `passes` is not part of dcc's interface")

from dcc.passes.base import Pass
from dcc.passes.coalesce_forecasts import CoalesceForecasts
from dcc.passes.drop_asserts import DropAsserts
from dcc.passes.drop_dead_nodes import DropDeadNodes
from dcc.passes.hoist_invariants import HoistInvariants
from dcc.passes.insert_cache_reads import InsertCacheReads
from dcc.passes.insert_cache_writes import InsertCacheWrites
from dcc.passes.insert_correctors import InsertCorrectors
from dcc.passes.insert_forecasts import InsertForecasts
from dcc.passes.insert_guidance import InsertGuidance
from dcc.passes.insert_measures import InsertMeasures
from dcc.passes.outline_blocks import OutlineBlocks
from dcc.passes.refresh_tokens import RefreshTokens
from dcc.passes.specialize import Specialize

PASSES: tuple[Pass, ...] = (
    CoalesceForecasts(),  # before any row: all rows read and write the same sites
    DropAsserts(),  # first of a row: an assertion counts as a use and would keep alive work that a forecast replaces
    InsertCorrectors(),  # before the writes: corrected sites are written relative to their maps
    InsertCacheWrites(),  # before the reads: a residual's base may itself be replaced by a read
    RefreshTokens(),  # before the reads: a refreshed value then becomes its forecast wherever it is named
    InsertCacheReads(),  # every use of a forecast site now reads its anchors
    InsertGuidance(),  # after the reads: the output that it joins may itself be forecast
    InsertMeasures(),  # after the reads: a drafted forecast that is compared with the truth is one more read
    InsertForecasts(),  # after all reads are in place, so that Inductor sees plain arithmetic only
    HoistInvariants(),  # after every pass that names nodes: a site, base or map may be a value that no step changes
    DropDeadNodes(),  # last of a row: what the reads made dead is the work that is saved
    Specialize(),  # first of lowering: code is made for one set of sizes
    OutlineBlocks(),  # last: blocks are alike only where all their sizes are known
)
