"""cuDNN against XLA attention on the GPU at hand: python tests/models/gpu_attention_check.py

By hand, since the test suite runs on CPUs.  Errors are against XLA in float32 on the same bfloat16
inputs; times are medians over rounds in which the kernels take turns.  Exits with 1 if a result is
not finite, if cuDNN is further from float32 than twice XLA's bfloat16 (or 1e-3), or if the compiled
program does not call cuDNN.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from st4vla_jax.config import VLM_PRESETS, Runtime
from st4vla_jax.models import attention_cudnn
from st4vla_jax.models.attention import attention, kernel_for, segment_mask
from st4vla_jax.models.qwen_lm import LanguageModel
from st4vla_jax.models.qwen_vision import VisionTower
from st4vla_jax.sharding import make_mesh

INNER, ROUNDS = 10, 7  # calls in one timed program; rounds
FAILURES: list[str] = []


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call: q [*lead,T,N,H], k and v [*lead,T,G,H]."""

    name: str
    lead: tuple[int, ...]
    length: int
    heads: int
    groups: int
    dim: int
    causal: bool
    mean_segment: int


SMALL = [
    Case(f"{kind} H={dim} G={groups}", (4,), 256, 8, groups, dim, kind == "causal", 60)
    for dim in (128, 80, 64)
    for kind in ("causal", "full")
    for groups in (8, 2)
]
WINDOWS = [Case(f"windows H={dim}", (2, 6), 64, 4, 4, dim, False, 20) for dim in (80, 64)]
SIZE_3B = [
    Case("LM 3B B=8 T=1024", (8,), 1024, 16, 2, 128, True, 250),
    Case("vision full B=8 P=2560", (8,), 2560, 16, 16, 80, False, 256),
    Case("vision windows B=8 W=40", (8, 40), 64, 16, 16, 80, False, 64),
]


def make_inputs(case: Case, seed: int = 0):
    """Random q, k, v, cotangent and packed segments; the last row is padding throughout."""
    rng = np.random.default_rng(seed)
    rows = int(np.prod(case.lead))
    segments = np.zeros((rows, case.length), np.int32)
    for row in range(rows - 1):
        start, number = 0, 1
        while start < case.length * 0.95:
            stop = start + int(rng.integers(1, 2 * case.mean_segment))
            segments[row, start:stop] = number
            start, number = stop, number + 1
    segments = jnp.asarray(segments.reshape(*case.lead, case.length))
    shapes = [(*case.lead, case.length, n, case.dim) for n in (case.heads, *(case.groups,) * 2)]
    q, k, v, g = (
        jnp.asarray(rng.standard_normal(s, np.float32), jnp.bfloat16) for s in (*shapes, shapes[0])
    )
    return q, k, v, g, segments


def make_gradient(case: Case, kernel: str, chunk: int = 1024):
    """(q, k, v, cotangent, segments, mask) -> (out, (dq, dk, dv))."""

    def run(q, k, v, g, segments, mask):
        def f(q, k, v):
            return attention(
                q, k, v, q_segments=segments, kv_segments=segments, causal=case.causal,
                query_chunk=chunk, kernel=kernel, mask=mask,
            )  # fmt: skip

        out, pull = jax.vjp(f, q, k, v)
        return out, pull(g.astype(out.dtype))

    return run


def mask_of(case: Case, kernel: str, segments):
    return segment_mask(kernel, jnp.bfloat16, case.dim, segments, segments, case.causal)


def error(got, want) -> float:
    """Largest difference over the four results, each relative to its largest value."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if not np.isfinite(a).all():
            return float("nan")
        worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    return worst


def compare(case: Case) -> None:
    q, k, v, g, segments = make_inputs(case)
    with jax.default_matmul_precision("highest"):
        wide = (x.astype(jnp.float32) for x in (q, k, v, g))
        want = jax.jit(make_gradient(case, "xla"))(*wide, segments, None)
    errors = {}
    for kernel in ("xla", "cudnn"):
        args = (q, k, v, g, segments, mask_of(case, kernel, segments))
        compiled = jax.jit(make_gradient(case, kernel)).lower(*args).compile()
        errors[kernel] = error(compiled(*args), want)
        if kernel == "cudnn" and "__cudnn$fmha" not in compiled.as_text():
            FAILURES.append(f"{case.name}: the compiled program does not call cuDNN")
    print(f"{case.name:28s} error xla {errors['xla']:.2e}  cudnn {errors['cudnn']:.2e}")
    if not errors["cudnn"] <= max(2 * errors["xla"], 1e-3):
        FAILURES.append(f"{case.name}: cudnn's error is {errors['cudnn']:.2e}")


def repeat(step):
    """INNER calls in one program, each with the last one's results as inputs."""

    def run(q, k, v, g, segments, mask):
        def body(_, qkv):
            out, grads = step(*qkv, g, segments, mask)
            if grads is None:
                return qkv[0] + 1e-3 * out, *qkv[1:]
            return tuple(x + 1e-3 * d.astype(x.dtype) for x, d in zip(qkv, grads, strict=True))

        return jax.lax.fori_loop(0, INNER, body, (q, k, v))

    return jax.jit(run)


def forward_only(case: Case, kernel: str):
    gradient = make_gradient(case, kernel)
    return lambda *args: (gradient(*args)[0], None)


def measure(case: Case) -> None:
    q, k, v, g, segments = make_inputs(case)
    programs, times = {}, {}
    for kernel in ("xla", "cudnn"):
        args = (q, k, v, g, segments, mask_of(case, kernel, segments))
        for phase, make in (("forward", forward_only), ("forward+backward", make_gradient)):
            compiled = repeat(make(case, kernel)).lower(*args).compile()
            programs[kernel, phase] = (compiled, args)
            jax.block_until_ready(compiled(*args))
            times[kernel, phase] = []
    for _ in range(ROUNDS):
        for key, (compiled, args) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            times[key].append((time.perf_counter() - start) / INNER * 1e3)
    for phase in ("forward", "forward+backward"):
        xla, cudnn = (statistics.median(times[kernel, phase]) for kernel in ("xla", "cudnn"))
        memory = [
            programs[kernel, phase][0].memory_analysis().temp_size_in_bytes / 2**20
            for kernel in ("xla", "cudnn")
        ]
        print(
            f"{case.name:28s} {phase:17s} xla {xla:8.3f} ms  cudnn {cudnn:8.3f} ms  "
            f"xla/cudnn {xla / cudnn:5.2f}  temporaries {memory[0]:.0f} / {memory[1]:.0f} MiB"
        )


def check_models() -> None:
    """Both tiny towers, with their scans and rematerialisation: cuDNN's loss and gradient."""
    vision, text = VLM_PRESETS["tiny"]
    rng = np.random.default_rng(1)
    segments = jnp.asarray(np.repeat([[1, 2, 2, 3], [1, 1, 1, 0]], 32, axis=1), jnp.int32)
    embeds = jnp.asarray(rng.standard_normal((2, 128, text.hidden_size), np.float32))
    positions = jnp.broadcast_to(jnp.arange(128)[None, :, None], (2, 128, 3))
    patches = jnp.asarray(rng.integers(0, 256, (2, 128, 588)), jnp.uint8)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(16), jnp.arange(8), indexing="ij"), -1)
    patch_hw = jnp.broadcast_to(grid.reshape(1, 128, 2), (2, 128, 2))
    inputs = {
        LanguageModel: (text, (embeds, positions, segments)),
        VisionTower: (vision, (patches, patch_hw, segments, segments)),
    }
    for model, (cfg, args) in inputs.items():
        results = {}
        for kernel in ("xla", "cudnn"):
            module = model(cfg, Runtime(attention=kernel))
            params = jax.jit(lambda key, m=module, a=args: m.init(key, *a))(jax.random.key(0))
            params = jax.tree.map(lambda p: 6 * p, params)  # else attention adds next to nothing

            def loss(params, module=module, args=args):
                out = module.apply(params, *args)
                out = getattr(out, "hidden", out).astype(jnp.float32)
                # Not their squares, whose sum the final norm fixes.
                return jnp.mean(out * jax.random.normal(jax.random.key(1), out.shape))

            results[kernel] = jax.jit(jax.value_and_grad(loss))(params)
        # Over all gradients together: some, as of the key's bias, are zero but for rounding.
        got, want = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(results[kernel])])
            for kernel in ("cudnn", "xla")
        )
        distance = np.linalg.norm(got - want) / np.linalg.norm(want)
        print(f"{model.__name__:28s} tiny, bf16: cudnn's gradient against xla's {distance:.2e}")
        if not distance < 0.03:
            FAILURES.append(f"{model.__name__}: cudnn's gradient differs by {distance:.2e}")


def check_shard_map() -> None:
    """cuDNN under shard_map, as on several GPUs; attention() itself has no need of it on one."""
    case = SMALL[0]
    *args, segments = make_inputs(case)
    mask = mask_of(case, "cudnn", segments)
    rows = jax.sharding.PartitionSpec("fsdp")

    def local(q, k, v, mask):
        return attention_cudnn.attend(q, k, v, mask, case.causal)

    def run(attend):
        def f(q, k, v, g):
            out, pull = jax.vjp(lambda *qkv: attend(*qkv, mask), q, k, v)
            return out, pull(g)

        return jax.jit(f)(*args)

    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        mapped = run(jax.shard_map(local, in_specs=(rows,) * 4, out_specs=rows, check_vma=False))
    worst = error(mapped, run(local))
    print(f"{'under shard_map':28s} against without it {worst:.2e}")
    if not worst < 1e-2:
        FAILURES.append(f"under shard_map cudnn differs by {worst:.2e}")


def main() -> None:
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind}")
    chosen = kernel_for("auto", jnp.bfloat16, 1024, 1024, 128)
    print(f"attention='auto' resolves to {chosen!r}")
    if chosen != "cudnn":
        sys.exit("this check needs a GPU with cuDNN's flash attention")
    for case in (*SMALL, *WINDOWS):
        compare(case)
    check_models()
    check_shard_map()
    for case in SIZE_3B:
        compare(case)
        measure(case)
    if FAILURES:
        sys.exit("\n".join(["FAILED", *FAILURES]))
    print("ok")


if __name__ == "__main__":
    main()
