"""Static policies: a schedule that neither the prompt nor the features change."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dcc.errors import PolicyError
from dcc.plans.predictors import Predictor
from dcc.policies.base import (
    DEFAULT_SITE,
    Cached,
    Policy,
    Setting,
    between,
    distances,
    ends,
    every,
    given_mask,
    listed,
    masked,
    method,
    whole,
)


@method(
    "static",
    title="Interval",
    source="baseline",
    checked="own",
    sites="any",
    trigger="every N-th step",
    predictor="copy",
)
def interval(
    setting: Setting, *, interval: int = 3, site: str = DEFAULT_SITE, steps_mask: Sequence[int] | None = None
) -> Policy:
    """Computes every `interval`-th step and copies in between; or computes the steps of `steps_mask`."""
    mask = every(setting, interval) if steps_mask is None else given_mask(setting, steps_mask)
    return Policy((Cached(site, mask),))


@method(
    "static",
    title="DeepCache",
    source="arXiv 2312.00858, repository horseee/DeepCache",
    checked="C",
    sites="cut:k, the deep side of a U-Net's skip",
    trigger="every N-th step, or spread around a centre",
    predictor="copy",
)
def deepcache(
    setting: Setting, *, interval: int = 3, branch: int = 0, center: int | None = None, power: float = 1.2
) -> Policy:
    """Computes a U-Net below its `branch`-th skip (0 the outermost) at every `interval`-th step only.

    With `center` (a step), as many full steps are spread unevenly, denser around it: evenly in the `power`-th root of
    the distance to it, as in the released non-uniform variant.
    """
    mask = every(setting, interval)
    whole(0, branch=branch)
    site = f"cut:{branch}"
    if site not in setting.sites:
        cuts = [name for name in ("cut:0", "cut:1", "cut:2") if name in setting.sites]
        raise PolicyError(
            f"deepcache needs a U-Net with a skip connection {branch}; "
            + (f"this one has others, e.g. {', '.join(cuts)}" if cuts else "this denoiser has none")
        )
    if center is not None and interval > 1:
        mask = listed(setting, around(setting.steps, sum(mask), center, power))
    return Policy((Cached(site, mask),))


def around(steps: int, count: int, center: int, power: float) -> list[int]:
    """Step 0 and `count` - 1 others, denser around `center`, as DeepCache's released non-uniform variant spreads them.

    Evenly spaced roots between those of the run's ends, back to their powers; before the centre the roots are complex
    and the powers' real parts are taken. `power` is lowered by 0.02 until no two steps agree.
    """
    between(1, steps - 1, center=center)
    between(1.0, 5.0, power=power)
    whole(center=center)
    for lowered in np.arange(power, 1, -0.02):
        roots = np.linspace(complex(-center) ** (1 / lowered), (steps - center) ** (1 / lowered), count + 1)
        distances_to = np.unique((roots**lowered).real.astype(int))[1:-1]
        if len(distances_to) == count - 1:
            return [0, *(center + int(distance) for distance in distances_to)]
    raise PolicyError(
        f"no {count} different steps of {steps} are denser around center={center}; give a larger interval="
    )


@method(
    "static",
    title="FasterDiffusion",
    source="arXiv 2312.09608, repository hutaiHang/Faster-Diffusion",
    checked="C",
    sites="encoder: all that a U-Net's decoder takes",
    trigger="listed key steps",
    predictor="copy",
)
def faster_diffusion(setting: Setting, *, key_steps: Sequence[int] | None = None) -> Policy:
    """Runs the encoder of a U-Net at key steps only; the decoder runs at every step.

    Key steps 0 to 3, 5, 10, 15, 25 and 35 of 50, scaled to other step counts. The injection of prior noise in late
    steps, which changes the sampler, is left out.
    """
    if "encoder" not in setting.sites:
        raise PolicyError("faster_diffusion needs a U-Net with skip connections; this denoiser has none")
    published = sorted({round(step * setting.steps / 50) for step in (0, 1, 2, 3, 5, 10, 15, 25, 35)})
    return Policy((Cached("encoder", listed(setting, published if key_steps is None else key_steps)),))


@method(
    "static",
    title="FORA",
    source="arXiv 2407.01425, repository prathebaselva/FORA",
    checked="C",
    sites="attention and MLP branches before their gates",
    trigger="every N-th step",
    predictor="copy",
)
def fora(setting: Setting, *, interval: int = 3) -> Policy:
    """Copies every attention and MLP output between full steps; gates are computed at every step."""
    return Policy((Cached("branches", every(setting, interval)),))


@method(
    "static",
    title="FRDiff",
    source="arXiv 2312.03517",
    checked="D",
    sites="branches",
    trigger="every N-th step",
    predictor="copy",
)
def frdiff(setting: Setting, *, interval: int = 2) -> Policy:
    """Reuses the residual branches between key steps. Score mixing, which blends two samplers, is left out."""
    return Policy((Cached("branches", every(setting, interval)),))


@method(
    "static",
    title="Delta-DiT",
    source="arXiv 2406.01125",
    checked="D",
    sites="rear blocks early in the run, front blocks late",
    trigger="every N-th step",
    predictor="copy",
)
def delta_dit(setting: Setting, *, interval: int = 2, share: float = 0.5, boundary: float = 0.5) -> Policy:
    """Caches what a range of blocks adds: the rear ones before the `boundary` share of steps, the front ones after it.

    Early steps draw outlines, which front blocks make, and late steps details. The paper tunes how many blocks are
    cached; here `share` of them. Refuses blocks that are not on one residual stream, as a U-Net's.
    """
    between(0.0, 1.0, share=share, boundary=boundary)
    blocks = setting.numbered(2)
    count = min(max(1, round(share * blocks)), blocks - 1)
    mask, late = every(setting, interval), round(boundary * setting.steps)
    rear = tuple(full if s < late else 1 for s, full in enumerate(mask))
    front = tuple(full if s >= late else 1 for s, full in enumerate(mask))
    ranges = (f"blocks[{blocks - count}:{blocks}]", f"blocks[0:{count}]")
    for name in ranges:
        if setting.sites[name].kind != "residual":
            raise PolicyError(f"delta_dit caches what blocks add to a residual stream; {name} does not end on its own")
    return Policy((Cached(ranges[0], rear), Cached(ranges[1], front)))


@method(
    "static",
    title="PAB",
    source="arXiv 2408.12588, repository NUS-HPC-AI-Lab/VideoSys",
    checked="C",
    sites="attention outputs by kind, MLPs where asked for",
    trigger="an interval per kind, in a window of timesteps",
    predictor="copy",
)
def pab(
    setting: Setting,
    *,
    attention: int = 2,
    cross: int = 6,
    mlp: int = 0,
    window: Sequence[float] = (100, 800),
) -> Policy:
    """Broadcasts attention outputs to the next steps, cross-attention longest, at timesteps inside the `window`.

    Computes a kind where count % interval is 0 or the timestep, of 1000, is outside. `mlp` 0 computes MLPs always.
    Spatial and temporal attention, which a graph does not tell apart, share one interval.
    """
    whole(attention=attention, cross=cross)
    whole(0, mlp=mlp)
    low, high = ends(window)
    scale = 1000 if max(setting.levels) <= 1.0 + 1e-6 else 1
    inside = [low < level * scale < high for level in setting.levels]
    caches = []
    for site, interval in (("self", attention), ("heads", attention), ("cross", cross), ("mlp", mlp)):
        if interval and setting.has(site):
            caches.append(Cached(site, tuple(int(s % interval == 0 or not w) for s, w in enumerate(inside))))
    if not caches:
        raise PolicyError("pab needs attention branches on a residual stream; this denoiser shows none")
    return Policy(tuple(caches))


@method(
    "static",
    title="SmoothCache",
    source="arXiv 2411.10510, repository Roblox/SmoothCache",
    checked="C",
    sites="branches by kind",
    trigger="calibrated: the longest look-ahead within a bound",
    predictor="copy",
    needs="profile",
)
def smoothcache(setting: Setting, *, alpha: float = 0.18, lookahead: int = 3) -> Policy:
    """For each kind of branch: from a computed step, copies for the longest look-ahead whose error is within `alpha`.

    The error is the relative distance of the branch outputs of two steps, averaged over blocks, streams and prompts;
    the first and last step compute. The distance is L2, which the profile holds for all pairs of steps, where the
    paper takes L1.
    """
    between(0.0, math.inf, alpha=alpha)
    whole(lookahead=lookahead)
    caches = []
    for group in ("self", "cross", "mlp", "joint"):
        if not setting.has(group):
            continue
        error = np.mean([distances(setting, site.name) for site in setting.sites.select(group)], axis=0)
        mask, anchor = [0] * setting.steps, 0
        while anchor < setting.steps:
            mask[anchor] = 1
            ahead = [j for j in range(1, lookahead + 1) if anchor + j < setting.steps]
            fitting = [j for j in ahead if error[anchor, anchor + j] <= alpha]
            anchor += max(fitting, default=0) + 1
        mask[-1] = 1
        caches.append(Cached(group, tuple(mask)))
    if not caches:
        raise PolicyError("smoothcache needs branches on a residual stream; this denoiser shows none")
    return Policy(tuple(caches))


@method(
    "static",
    title="BlockDance",
    source="arXiv 2503.15927",
    checked="D",
    sites="after:i, the value after a block",
    trigger="groups of N steps in a late window",
    predictor="copy",
)
def blockdance(
    setting: Setting, *, interval: int = 2, depth: float = 0.7, window: Sequence[float] = (0.25, 0.95)
) -> Policy:
    """Skips the blocks up to the one at `depth` and computes the rest from its last value, late in the run.

    In groups of `interval` steps inside the `window` (shares of the run: 0.25 or 0.40 to 0.95 in the paper) the first
    computes all. The paper's block 20 of 28 is a depth of 0.7. Its learned variant is left out. Refuses skip
    connections, which carry what the skipped blocks give past that one.
    """
    whole(interval=interval)
    between(0.0, 1.0, depth=depth)
    low, high = (share * setting.steps for share in ends(window))
    blocks = setting.numbered(2)
    if "cut:0" in setting.sites:
        raise PolicyError("blockdance skips the first blocks, whose values this denoiser's skip connections need later")
    index = min(max(0, math.ceil(depth * blocks) - 1), blocks - 2)
    start = math.ceil(low)
    mask = tuple(int(s == 0 or not low <= s < high or (s - start) % interval == 0) for s in range(setting.steps))
    return Policy((Cached(f"after:{index}", mask),))


@method(
    "static",
    title="Skip-DiT",
    source="arXiv 2411.17616",
    checked="D",
    sites="all blocks but the first and last",
    trigger="every N-th step in a window of timesteps",
    predictor="copy",
    needs="long skips",
)
def skip_dit(setting: Setting, *, interval: int = 2, window: Sequence[float] = (50, 700)) -> Policy:
    """Computes the first and last block at every step and the others at every `interval`-th, inside the `window`.

    Timesteps of 1000, published as N2-700-50. The method retrains the model with long skip connections around the
    cached blocks; it runs on any other, with more error.
    """
    whole(interval=interval)
    blocks = setting.numbered(3)
    low, high = ends(window)
    scale = 1000 if max(setting.levels) <= 1.0 + 1e-6 else 1
    mask = [int(s % interval == 0 or not low < t * scale < high) for s, t in enumerate(setting.levels)]
    return Policy((Cached(f"blocks[1:{blocks - 1}]", tuple(mask)),))


@method(
    "static",
    title="ECAD",
    source="arXiv 2506.15682, repository aniaggarwal/ecad",
    checked="D",
    sites="branches, each with steps of its own",
    trigger="searched mask",
    predictor="copy",
    needs="search or mask",
)
def ecad(
    setting: Setting,
    *,
    speedup: float = 2.0,
    population: int = 8,
    generations: int = 4,
    seed: int = 0,
    mask: Sequence[Sequence[int]] | str | None = None,
) -> Policy:
    """A genetic search over which branch computes at which step, judged by the calibration prompts' final samples.

    Starts from even intervals and random masks of about 1 / `speedup` ones; each generation keeps the better half and
    fills up with children (a row of either parent at every step) in which single entries flip. The paper keeps a whole
    Pareto set of speed and quality; here one share of computed entries is held. `mask` (steps x branches, nested lists
    or a .json file) skips the search.
    """
    sites = [site.name for site in setting.sites.select("innermost")]
    if mask is not None:
        return masked(setting, sites, mask)
    between(1.0, setting.steps, speedup=speedup)
    whole(2, population=population)
    whole(0, generations=generations)
    rng = np.random.default_rng(seed)
    ones = max(1, round(setting.steps * len(sites) / speedup))

    def valid(genes: np.ndarray) -> np.ndarray:
        """The genes with the first step computed and `ones` ones in all, flipped at random where they are not."""
        genes = genes.copy()
        genes[0] = 1
        excess = int(genes.sum()) - max(ones, len(sites))
        places = np.argwhere(genes[1:] == (excess > 0))
        for row, column in places[rng.permutation(len(places))[: abs(excess)]]:
            genes[row + 1, column] = int(excess < 0)
        return genes

    def policy(genes: np.ndarray) -> Policy:
        return masked(setting, sites, genes.astype(int).tolist())

    even = np.repeat(np.array(every(setting, max(1, round(speedup))))[:, None], len(sites), 1)
    pool = [valid(even)] + [valid((rng.random(even.shape) < 1 / speedup) | even) for _ in range(population - 1)]
    scored = [(setting.score(policy(genes)), index, genes) for index, genes in enumerate(pool)]
    for _ in range(generations):
        scored = sorted(scored, key=lambda item: -item[0])[: max(2, population // 2)]
        parents = [genes for _, _, genes in scored]
        while len(scored) < population:
            a, b = (parents[i] for i in rng.choice(len(parents), 2, replace=False))
            child = np.where(rng.random((setting.steps, 1)) < 0.5, a, b)
            flips = rng.random(child.shape) < 2 / child.size
            child = valid(np.where(flips, 1 - child, child))
            scored.append((setting.score(policy(child)), len(scored), child))
    return policy(max(scored, key=lambda item: item[0])[2])


@method(
    "static",
    title="T-GATE",
    source="arXiv 2404.02747, repository HaozheLiu-ST/T-GATE",
    checked="C",
    sites="self and cross-attention, uncond",
    trigger="phases",
    predictor="copy; guidance dropped",
)
def t_gate(
    setting: Setting,
    *,
    gate_step: int | None = None,
    sp_interval: int = 5,
    fi_interval: int = 1,
    warm_up: int = 2,
    drop_guidance: bool | None = None,
) -> Policy:
    """Freezes cross-attention after `gate_step`; self-attention is computed every few steps.

    The first `warm_up` steps compute all, then self-attention every `sp_interval` steps up to the gate (2/5 of the run
    unless given, the published 10 of 25), and every `fi_interval` after it. With `drop_guidance` the conditional half
    alone runs after the gate and stands for both, which changes what the sampler computes: None does so where the
    batch is merged, True refuses any other run. The paper also averages the halves of the frozen attention, and feeds
    the one pass the negative prompt; both are left out.
    """
    gate = round(0.4 * setting.steps) if gate_step is None else gate_step
    whole(warm_up=warm_up, gate_step=gate, sp_interval=sp_interval, fi_interval=fi_interval)
    if not setting.has("cross"):
        raise PolicyError("t_gate needs cross-attention branches; this denoiser has none")
    phases = [fi_interval if s >= gate else sp_interval if s >= warm_up else 1 for s in range(setting.steps)]
    attention = tuple(int((s - (gate if s >= gate else warm_up)) % phase == 0) for s, phase in enumerate(phases))
    before = tuple(int(s < gate) for s in range(setting.steps))
    caches = [Cached("self", attention), Cached("cross", before)]
    if drop_guidance or (drop_guidance is None and "uncond" in setting.sites):
        caches.append(Cached("uncond", before, Predictor("zero")))
    return Policy(tuple(caches))


@method(
    "static",
    title="DiTFastAttn",
    source="arXiv 2406.08552, repository thu-nics/DiTFastAttn",
    checked="C",
    sites="each attention branch on its own",
    trigger="calibrated: sharing with the step before within a bound",
    predictor="copy",
    needs="profile",
)
def ditfastattn(setting: Setting, *, delta: float = 0.05) -> Policy:
    """Shares attention outputs between steps: layer l of L copies where the error stays below delta (l + 1) / L.

    Its output-sharing part. The error is the relative distance of the branch to its last computed value in the profile,
    where the paper measures the loss of the final output layer by layer; window attention with a cached residual, and
    sharing between the guided halves inside a layer, are left out.
    """
    between(0.0, math.inf, delta=delta)
    names = [site.name for group in ("self", "heads") if setting.has(group) for site in setting.sites.select(group)]
    if not names:
        raise PolicyError("ditfastattn needs self-attention branches; this denoiser shows none")
    caches = []
    for layer, name in enumerate(names):
        distance, mask, anchor = distances(setting, _measured(setting, name)), [1], 0
        for step in range(1, setting.steps):
            mask.append(int(not distance[anchor, step] < delta * (layer + 1) / len(names)))
            anchor = step if mask[-1] else anchor
        caches.append(Cached(name, tuple(mask)))
    return Policy(tuple(caches))


@method(
    "static",
    title="ICC",
    source="arXiv 2505.05829, repository ccccczzy/icc",
    checked="C",
    sites="every linear layer of the blocks",
    trigger="every N-th step",
    predictor="copy",
)
def icc(
    setting: Setting,
    *,
    interval: int = 2,
    first: int = 1,
    rank: int | None = None,
    channels: str | None = None,
    site: str = "linears",
) -> Policy:
    """Copies the output of every linear layer, corrected by what changed in its input times a low-rank weight.

    y = y_c + (x - x_c) W_r, W_r being the layer's live weight at `rank`: unless given, a ninth of the width, which is
    the paper's 128 for 1152. With `channels`, a safetensors file of a tensor [C] per layer, the approximation weighs
    input channels by it: the paper's channel-aware SVD, where they are mean magnitudes of x or of its change between
    steps. Attention itself, norms and gates are computed at every step. The anchor is y_c - x_c W_r, so computed steps
    run the small product too.
    """
    mask = every(setting, interval, first)
    if not setting.has(site):
        raise PolicyError(f"icc needs linear layers inside repeated blocks; this denoiser has no {site!r}")
    rank = max(1, setting.sites.select(site)[0].shapes[0][-1] // 9) if rank is None else rank
    whole(rank=rank)
    spec = {"kind": "low_rank", "rank": rank, "channels": channels}
    return Policy((Cached(site, mask, form={"corrector": spec}),))


def _measured(setting: Setting, name: str) -> str:
    """The profile's site that stands for this one: joined heads are measured with their MLP."""
    return name if name in setting.profile.sites else name.replace("/heads", "/attn+mlp")
