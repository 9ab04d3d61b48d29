"""What people do to models: one small function each, and one table of them all.

Every function changes the model on the bench, and returns a few words about what it did. What it
chooses, it chooses with the bench's own random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from bench import Bench, Slot, block_at
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

Change = Callable[[Tensor], Tensor]


# What is done to an activation


def a_change(bench: Bench, slot: Slot, *, strict: bool = True) -> tuple[Change, str]:
    """A change of activations [batch, pos, width]: what, and where in them.

    Args:
        bench: the bench.
        slot: where.
        strict: whether it may take nothing but activations of the prompt's own shape.
    """
    kind = bench.chosen("zero", "add", "scale", *(["patch", "noise"] if strict else []))
    where = bench.chosen("all", "all", "last", "from", "at", "half")
    in_place = bench.chosen(False, False, True)
    width = bench.ids.shape[1]
    at = bench.random.randrange(width)
    places: dict[str, Any] = {
        "all": (slice(None),),
        "last": (slice(None), slice(-1, None)),
        "from": (slice(None), slice(at, None)),
        "at": (slice(None), slice(at, at + 1)),
        "half": (..., slice(0, None, 2)),
    }
    there = places[where]
    if kind == "patch":
        stored = _stored(bench, slot)
        kind = "zero" if stored is None else "patch"
    bench.positional |= where in ("last", "from", "at") or kind in ("patch", "noise")
    scale, seed = bench.chosen(-1.0, 0.5, 2.0), bench.random.randrange(2**16)
    vectors: dict[int, Tensor] = {}

    def change(x: Tensor) -> Tensor:
        y = x if in_place else x.clone()
        part = y[there]
        if kind == "zero":
            y[there] = 0
        elif kind == "scale":
            y[there] = part * scale
        elif kind == "patch":
            y[there] = stored[there].to(y.dtype)
        else:
            size = x.shape[-1] if kind == "add" else x.shape
            key = x.shape[-1]
            if key not in vectors:
                made = torch.Generator().manual_seed(seed)
                vectors[key] = torch.randn(size, generator=made, dtype=torch.float64)
            y[there] = (x + vectors[key].to(x.dtype))[there]
        return y

    return change, f"{kind} {where}{' in place' if in_place else ''} ({at}, {scale})"


@torch.no_grad()
def _stored(bench: Bench, slot: Slot) -> Tensor | None:
    """What stands there when the model runs on other tokens of the same shape."""
    seen: list[Tensor] = []
    keep = lambda module, args, out: seen.append(_first(out).detach().clone())  # noqa: E731
    handle = slot.now.register_forward_hook(keep)
    try:
        with bench.running():
            bench.model(bench.ids.flip(1), use_cache=False)
    except Exception:
        return None  # it does not run: the draw is thrown away by the plain run
    finally:
        handle.remove()
    return seen[0] if seen else None


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def changed(out: Any, change: Change) -> Any:
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, tuple):
        return (change(out[0]), *out[1:])
    out[next(iter(out))] = change(out[0])  # a model's output
    return out


# Hooks


def forward_hook(bench: Bench) -> str:
    name, slot = bench.place()
    change, said = a_change(bench, slot)
    options = {key: bench.chosen(False, False, True) for key in ("prepend", "always_call")}
    with_kwargs = bench.chosen(False, True)

    def hook(module, args, *rest):
        return changed(rest[-1], change)

    slot.now.register_forward_hook(hook, with_kwargs=with_kwargs, **options)
    return f"{name}: {said}, {options}"


def forward_pre_hook(bench: Bench) -> str:
    name, slot = bench.place()
    change, said = a_change(bench, slot)
    with_kwargs = bench.chosen(False, True)

    def hook(module, args, *kwargs):
        if args and not (isinstance(args[0], Tensor) and args[0].is_floating_point()):
            return None  # ids
        if args:
            done = (change(args[0]), *args[1:])
            return (done, *kwargs) if kwargs else done
        if kwargs and "hidden_states" in kwargs[0]:
            return args, {**kwargs[0], "hidden_states": change(kwargs[0]["hidden_states"])}
        return None

    slot.now.register_forward_pre_hook(
        hook, with_kwargs=with_kwargs, prepend=bench.chosen(False, True)
    )
    return f"{name}: {said}, with_kwargs={with_kwargs}"


def recording_hook(bench: Bench) -> str:
    name, slot = bench.place()
    seen: list[Tensor] = []
    slot.now.register_forward_hook(lambda module, args, out: seen.append(_first(out).detach()))
    slot.now.register_forward_pre_hook(lambda module, args: seen.extend(args[:1]))
    bench.resets.append(seen.clear)
    return name


def strict_hook(bench: Bench) -> str:
    """A hook that takes nothing but the prompt's own shape."""
    name, slot = bench.place()
    shape = tuple(bench.ids.shape)
    bench.positional = True

    def hook(module, args, out):
        assert _first(out).shape[:2] in (shape, (1, shape[1]), (shape[0] * shape[1],), shape[1:])

    slot.now.register_forward_hook(hook)
    return name


def hook_with_a_memory(bench: Bench) -> str:
    """It acts on the first run after each reset only, as a hook that takes itself off does."""
    name, slot = bench.place()
    change, said = a_change(bench, slot)
    runs: list[int] = []
    bench.resets.append(runs.clear)

    def hook(module, args, out):
        runs.append(1)
        return changed(out, change) if len(runs) == 1 else None

    slot.now.register_forward_hook(hook)
    bench.positional = True
    return f"{name}: {said}, once"


def backward_hook(bench: Bench) -> str:
    name, slot = bench.place()
    if bench.chosen(False, True):
        slot.now.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    else:
        slot.now.register_full_backward_pre_hook(lambda module, grad_out: None)
    return name


def hook_on_the_whole(bench: Bench) -> str:
    module = bench.chosen(bench.root, bench.root.base_model)
    change, said = a_change(bench, bench.places["final_norm"])
    harmless = bench.chosen(False, True)

    def hook(module, args, kwargs, out):
        return out if harmless else changed(out, change)

    module.register_forward_hook(hook, with_kwargs=True)
    return f"{type(module).__name__}: {'nothing' if harmless else said}"


def vocabulary_mask(bench: Bench) -> str:
    slot = bench.places["head"]
    value = bench.chosen(-1e9, -1e4, -3e38, float("-inf"))
    first = bench.random.randrange(3, 40)

    def hook(module, args, out):
        out = out.clone()
        lowest = torch.finfo(out.dtype).min
        out[..., first : first + 7] = value if value < -1e300 else max(value, lowest)
        return out

    slot.now.register_forward_hook(hook)
    return f"{value} from {first}"


def bias_on_logits(bench: Bench) -> str:
    bias = bench.noise(bench.root.config.vocab_size)
    bench.places["head"].now.register_forward_hook(lambda module, args, out: out + bias)
    return ""


def global_hook(bench: Bench) -> str:
    @contextlib.contextmanager
    def context():
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            yield
        finally:
            handle.remove()

    bench.contexts.append(context)
    return ""


# Code in the place of modules


def replaced_forward(bench: Bench) -> str:
    name, slot = bench.place()
    change, said = a_change(bench, slot, strict=False)
    form = bench.chosen("closure", "method", "wraps", "nothing")
    module, own = slot.now, slot.now.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        return out if form == "nothing" else changed(out, change)

    if form == "method":
        kind = type(module)

        def as_method(self, *args, **kwargs):
            return changed(kind.forward(self, *args, **kwargs), change)

        module.forward = types.MethodType(as_method, module)
    else:
        module.forward = functools.wraps(own)(forward) if form == "wraps" else forward
    bench.only_sums |= name in ("final_norm", "head") or name.endswith("block")
    return f"{name}: {form} {said}"


class Wrapper(nn.Module):
    """Around a module, with a change of what it puts out."""

    def __init__(self, inner: nn.Module, change: Change | None) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return out if self.change is None else changed(out, self.change)


class OpenWrapper(Wrapper):
    """One that hands on what it is asked for."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def wrapper(bench: Bench) -> str:
    name, slot = bench.place()
    change, said = a_change(bench, slot, strict=False)
    kind = bench.chosen(Wrapper, OpenWrapper)
    quiet = bench.chosen(False, True)
    made = kind(slot.now, None if quiet else change)
    slot.put(made.eval() if bench.chosen(False, True, True) else made)
    bench.only_sums |= name in ("final_norm", "head") or name.endswith(("block", "o_proj"))
    return f"{name}: {kind.__name__} {'' if quiet else said}"


def sequential(bench: Bench) -> str:
    name, slot = bench.place("mlp", "o_pr", "norm")
    slot.put(nn.Sequential(slot.now, nn.Identity()).eval())
    bench.only_sums |= name.endswith("o_proj")
    return name


def mlp_taken_out(bench: Bench) -> str:
    class Nothing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.like = [inner]  # for the form of its output

        def forward(self, x, *args):
            return changed(self.like[0].forward(x, *args), torch.zeros_like)

    name, slot = bench.place("mlp")
    slot.put(Nothing(slot.now) if bench.chosen(False, True) else nn.Identity())
    return name


def strict_code(bench: Bench) -> str:
    """A wrapper or a ``forward`` that takes nothing but the prompt's own shape."""
    name, slot = bench.place("mlp", "norm", "attn", "o_pr")
    shape = tuple(bench.ids.shape)
    bench.positional = True

    def check(x: Tensor) -> Tensor:
        if x.shape[:2] != shape:
            raise ValueError(f"made for {shape}")
        return x

    if bench.chosen(False, True):
        slot.put(OpenWrapper(slot.now, check).eval())
        return f"{name}: wrapper"
    own = slot.now.forward
    slot.now.forward = lambda *args, **kwargs: changed(own(*args, **kwargs), check)
    return f"{name}: forward"


def fewer_layers(bench: Bench) -> str:
    holder, _, name = bench.family.layers.rpartition(".")
    parent = bench.root.get_submodule(holder)
    kept = bench.random.randint(1, len(bench.blocks))
    layers = nn.ModuleList(list(parent._modules[name])[:kept])
    setattr(parent, name, layers)
    tell = bench.chosen(False, True)
    for field in ("num_hidden_layers", "n_layer", "num_layers"):
        if tell and hasattr(bench.root.config, field):
            setattr(bench.root.config, field, kept)
            break
    bench.blocks = [block_at(bench.family, layers, name) for name in layers._modules]
    return f"{kept}, config {'told' if tell else 'not told'}"


def a_layer_twice(bench: Bench) -> str:
    holder, _, name = bench.family.layers.rpartition(".")
    layers = bench.root.get_submodule(holder)._modules[name]
    layers.append(layers[0] if bench.chosen(False, True) else layers[-1])
    bench.only_sums = True
    return ""


# Weights


def _linear(bench: Bench, *kinds: str) -> tuple[str, nn.Module] | None:
    """A linear module of the model, anywhere."""
    found = [
        (name, module)
        for name, module in bench.root.named_modules()
        if isinstance(module, nn.Linear) and (not kinds or name.endswith(kinds))
    ]
    return bench.chosen(*found) if found else None


def parametrized(bench: Bench) -> str:
    class Symmetric(nn.Module):
        def forward(self, w):
            return 0.5 * w + 0.1

    found = _linear(bench)
    if found is None:
        return "no linear module"
    name, module = found
    parametrize.register_parametrization(module, "weight", Symmetric().eval())
    return name


def weight_norm(bench: Bench) -> str:
    found = _linear(bench)
    if found is None:
        return "no linear module"
    name, module = found
    old = bench.chosen(False, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm)(module)
    return f"{name}{' (old)' if old else ''}"


def pruned(bench: Bench) -> str:
    found = _linear(bench)
    if found is None:
        return "no linear module"
    name, module = found
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if bench.chosen(False, True):
            prune.l1_unstructured(module, "weight", amount=0.4)
        else:
            prune.random_structured(module, "weight", amount=0.4, dim=bench.chosen(0, 1))
        if bench.chosen(False, True):
            prune.remove(module, "weight")
    return name


@torch.no_grad()
def head_zeroed(bench: Bench) -> str:
    name, slot = bench.place("o_pr")
    weight = slot.now.weight
    n_heads = bench.root.config.num_attention_heads
    axis = 0 if type(slot.now).__name__ == "Conv1D" else 1
    size = weight.shape[axis] // n_heads
    weight.narrow(axis, size * bench.random.randrange(n_heads), size).zero_()
    return name


@torch.no_grad()
def weights_edited(bench: Bench) -> str:
    found = list(bench.root.named_parameters())
    name, weight = bench.chosen(*found)
    how = bench.chosen("add_", ".data", "new Parameter", "load_state_dict")
    noise = bench.noise(*weight.shape).to(weight.dtype) * 0.2
    if how == "add_":
        weight.add_(noise)
    elif how == ".data":
        weight.data += noise
    elif how == "load_state_dict":
        bench.root.load_state_dict({name: weight + noise}, strict=False)
    else:
        parent, _, last = name.rpartition(".")
        setattr(bench.root.get_submodule(parent), last, nn.Parameter(weight + noise))
    return f"{name} {how}"


def untied(bench: Bench) -> str:
    head = bench.places["head"].now
    head.weight = nn.Parameter(head.weight.detach() * 1.5)
    return ""


def head_gets_bias(bench: Bench) -> str:
    head = bench.places["head"].now
    head.bias = nn.Parameter(bench.noise(len(head.weight)))
    return ""


def larger_vocabulary(bench: Bench) -> str:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench.root.resize_token_embeddings(bench.root.config.vocab_size + 3, mean_resizing=False)
    return ""


def frozen(bench: Bench) -> str:
    bench.root.requires_grad_(False)
    return ""


def lora(bench: Bench) -> str:
    import peft

    names = {name for name, m in bench.root.named_modules() if type(m).__name__ in _LINEAR}
    last = sorted({name.rpartition(".")[2] for name in names})
    chosen = [name for name in last if bench.chosen(False, True)] or last[:1]
    how = bench.chosen("on", "merged", "off", "two", "unloaded")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=chosen, lora_dropout=0.0)
        made = peft.get_peft_model(bench.root, config)
        if how == "two":
            made.add_adapter("other", config)
            made.base_model.set_adapter(bench.chosen(["other"], ["default", "other"]))
        made.eval()
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if "lora_" in name:
                    weight.copy_(0.3 * bench.noise(*weight.shape))
        if how == "merged":
            made.merge_adapter()
        elif how == "off":
            made.base_model.disable_adapter_layers()
        elif how == "unloaded":
            made = made.merge_and_unload()
    if how == "unloaded" or bench.chosen(False, True):
        bench.model = made
    return f"{how} {chosen}"


_LINEAR = ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")


# Dtypes, devices, modes


def _cast(slot: Slot, dtype: torch.dtype, back: torch.dtype | None) -> None:
    module = slot.now.to(dtype)

    def before(module, args, kwargs):
        def cast(x):
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}

    module.register_forward_pre_hook(before, with_kwargs=True)
    if back is not None:
        module.register_forward_hook(lambda m, args, out: changed(out, lambda x: x.to(back)))


def cast_with_hooks(bench: Bench) -> str:
    name, slot = bench.place("mlp", "o_pr", "head", "fina", "norm")
    dtype = bench.chosen(torch.float32, torch.float64)
    _cast(slot, dtype, None if name == "head" else bench.dtype)
    return f"{name} {dtype}"


def cast_plainly(bench: Bench) -> str:
    dtype = bench.chosen(torch.float32, torch.float64)
    names = bench.chosen(("head", "final_norm"), ("final_norm",), ("norm",), ("embed",))
    for name, slot in bench.places.items():
        if name in names or ("norm" in names and ".norm" in name):
            slot.now.to(dtype)
    return f"{names} {dtype}"


def _within(make: Callable[[], Any]) -> Callable[[Bench], str]:
    def intervention(bench: Bench) -> str:
        bench.contexts.append(make)
        return ""

    return intervention


@contextlib.contextmanager
def _default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if before == torch.float32 else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def default_device(bench: Bench) -> str:
    bench.contexts.append(lambda: torch.device("meta"))
    bench.positional = True  # no chunks: transformers' own caches fail there
    return "meta"


def training(bench: Bench) -> str:
    if bench.chosen(False, True):
        bench.root.train()
        return "whole"
    name, slot = bench.place()
    slot.now.train()
    return name


# Settings


def setting(bench: Bench) -> str:
    """A number that a module or a config keeps, put to another value."""
    found = [
        (module, name, path)
        for path, module in bench.root.named_modules()
        for name, value in vars(module).items()
        if type(value) is float and ("eps" in name or "mult" in name or "scal" in name)
    ]
    if not found:
        return "nothing"
    module, name, path = bench.chosen(*found)
    value = getattr(module, name) * bench.chosen(0.5, 2.0)
    setattr(module, name, value)
    return f"{path}.{name} = {value}"


def config_setting(bench: Bench) -> str:
    config = bench.root.config
    found = {
        "output_hidden_states": True,
        "use_cache": False,
        "logits_scaling": 1.5,
        "logit_scale": 0.7,
        "final_logit_softcapping": 3.0,
        "rms_norm_eps": 0.5,
        "residual_multiplier": 0.3,
    }
    name = bench.chosen(*(name for name in found if hasattr(config, name)))
    setattr(config, name, found[name])
    return f"{name} = {found[name]}"


@dataclasses.dataclass(frozen=True)
class Intervention:
    """One row of the table.

    Attributes:
        do: what it does.
        late: whether it may also come between two calls.
        share: how often it is drawn, against the others.
    """

    do: Callable[[Bench], str]
    late: bool = True
    share: int = 2


TABLE: dict[str, Intervention] = {
    "forward hook": Intervention(forward_hook, share=10),
    "forward pre-hook": Intervention(forward_pre_hook, share=8),
    "recording hook": Intervention(recording_hook),
    "strict hook": Intervention(strict_hook),
    "hook with a memory": Intervention(hook_with_a_memory),
    "backward hook": Intervention(backward_hook),
    "hook on the whole": Intervention(hook_on_the_whole, share=1),
    "vocabulary mask": Intervention(vocabulary_mask),
    "bias on logits": Intervention(bias_on_logits),
    "global hook": Intervention(global_hook, share=1),
    "replaced forward": Intervention(replaced_forward, share=3),
    "wrapper": Intervention(wrapper, share=4),
    "strict code": Intervention(strict_code, share=1),
    "sequential": Intervention(sequential),
    "mlp taken out": Intervention(mlp_taken_out),
    "fewer layers": Intervention(fewer_layers),
    "a layer twice": Intervention(a_layer_twice, share=1),
    "parametrized": Intervention(parametrized),
    "weight norm": Intervention(weight_norm),
    "pruned": Intervention(pruned),
    "head zeroed": Intervention(head_zeroed),
    "weights edited": Intervention(weights_edited, share=6),
    "untied": Intervention(untied),
    "head gets bias": Intervention(head_gets_bias),
    "larger vocabulary": Intervention(larger_vocabulary),
    "frozen": Intervention(frozen, share=1),
    "lora": Intervention(lora, late=False, share=4),
    "cast with hooks": Intervention(cast_with_hooks),
    "cast plainly": Intervention(cast_plainly),
    "training": Intervention(training, share=1),
    "setting": Intervention(setting, share=3),
    "config setting": Intervention(config_setting, share=3),
    "inference mode": Intervention(_within(torch.inference_mode), share=1),
    "enable grad": Intervention(_within(torch.enable_grad), share=1),
    "default dtype": Intervention(_within(_default_dtype), share=1),
    "default device": Intervention(default_device, share=1),
    "autocast": Intervention(_within(lambda: torch.autocast("cpu", torch.bfloat16)), share=1),
}
NAMES = [name for name, one in TABLE.items() for _ in range(one.share)]
