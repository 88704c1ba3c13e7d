"""What may be rebuilt out of a saved file: classes, functions, and the hints for what may not.

Everything here is a name. Nothing is imported until every name in a file has passed.
"""

from __future__ import annotations

import sys

# Packages of plain layers: every class in them may be rebuilt (never called), under the rules of `load.build`.
CLASS_PACKAGES = (
    "torch.nn.modules",
    "torchvision.models",
    "torchvision.ops",
    "timm.layers",
    "timm.models",
    "transformers.models",
)
# Single modules beside those packages that real models need.
CLASS_MODULES = frozenset(
    {
        "transformers.activations",
        "transformers.configuration_utils",
        "transformers.generation.configuration_utils",
        "transformers.pytorch_utils",
    }
)
# Their unpickling starts processes, calls or patches; `--trust` does not lift this.
DENIED_CLASSES = frozenset(
    {
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.distributed.nn.api.remote_module.RemoteModule",
        "torch.distributed.nn.api.remote_module._RemoteModule",
    }
)
# Plain types that may stand as a value (a `defaultdict` factory, a stored constructor).
TYPES = frozenset(
    f"builtins.{name}" for name in ("bool", "bytes", "complex", "dict", "float", "int", "list", "set", "str", "tuple")
)

_FUNCTIONAL = (
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d alpha_dropout avg_pool1d "
    "avg_pool2d batch_norm celu cosine_similarity dropout dropout2d elu gelu glu group_norm gumbel_softmax hardshrink "
    "hardsigmoid hardswish hardtanh instance_norm interpolate layer_norm leaky_relu log_softmax logsigmoid max_pool1d "
    "max_pool2d mish normalize pad pixel_shuffle prelu relu relu6 rrelu selu sigmoid silu softmax softmin softplus "
    "softshrink softsign tanh tanhshrink threshold unfold"
)
_TORCH = (
    "abs add cat celu cos erf exp log log_softmax matmul mul relu rrelu selu sigmoid sign sin softmax sqrt square tanh"
)
_NATIVE = (
    "avg_pool2d avg_pool3d elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid relu6 silu mish softplus "
    "softshrink"
)
# Activations and other pure tensor functions that a model may hold as an attribute.
FUNCTIONS = frozenset(
    [f"torch.nn.functional.{name}" for name in _FUNCTIONAL.split()]
    + [f"torch.{name}" for name in _TORCH.split()]
    + [f"torch._C._nn.{name}" for name in _NATIVE.split()]
)

# Nobody's models lie in these: Python's own, the script that runs, and what padconvert is made of and installed with.
# Their functions would do anything to please whoever wrote a file (`padconvert.__main__:main` reads any command line),
# so no --trust lets a file call them. Their classes that are layers are on the lists above.
_INSTALLED = """
    PIL __main__ _distutils_hack _multiprocess _pytest _xxhash _yaml accelerate annotated_doc annotated_types anyio
    attr attrs certifi charset_normalizer click cloudpickle contourpy cycler datasets dateutil dill execnet filelock
    flatbuffers fontTools fsspec functorch google h11 h2 hf_xet httpcore httpcore2 httpx httpx2 huggingface_hub
    hypothesis idna iniconfig isympy jinja2 joblib kiwisolver markdown_it markupsafe matplotlib mdurl ml_dtypes
    mpl_toolkits mpmath multiprocess mypy mypy_extensions mypyc narwhals networkx numpy nvidia onnx onnx_ir onnxruntime
    onnxscript packaging padconvert pandas pathspec pip pkg_resources pkgutil_resolve_name platformdirs pluggy psutil
    py pyarrow pydantic pydantic_core pygments pylab pyparsing pytest pytest_timeout pytz regex requests rich ruff
    safetensors scipy setuptools shellingham six sklearn sniffio sortedcontainers sympy threadpoolctl tokenizers torch
    torchgen tqdm transformers triton truststore typer typing_extensions typing_inspection tzdata urllib3 uv
    virtualenv wheel xdist xxhash yaml
"""
NO_MODELS = frozenset([*sys.stdlib_module_names, *_INSTALLED.split()])

# They only say on which devices the network inside them runs: it is taken out, and they are never built.
WRAPPERS = frozenset({"torch.nn.parallel.data_parallel.DataParallel"})

# Found beside the weights of a training checkpoint; such entries are left unread, never rebuilt.
UNREAD_PACKAGES = (
    "argparse",
    "datetime",
    "lightning",
    "lightning_fabric",
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "torch.optim",
    "torchmetrics",
)

# What to do instead, by the start of a refused name; the first match counts.
HINTS = (
    ("__main__", "its class was defined in a script. Move the class into a module (net.py), save the model again "
     "from there and add --trust net; or save its state dict and name a factory with --arch net:make"),
    ("padconvert.", "it is converted already: write it with padconvert.save(model, path), and read that file with "
     "padconvert.load(path)"),
    ("torch.fx", "save the module before tracing it, or export it with torch.export.save"),
    ("torch.jit", "TorchScript cannot be converted: export it again, or give its state dict and --arch"),
    ("torch._dynamo", "save the module below torch.compile (model._orig_mod)"),
    ("torch._utils._rebuild_sparse", "make its sparse tensors dense (tensor.to_dense()), then save again"),
    ("torch.serialization._get_layout", "make its sparse tensors dense (tensor.to_dense()), then save again"),
    ("torch._utils._rebuild_nested", "it holds nested tensors, which no layer takes; save the state dict without them"),
    ("torch._utils._rebuild_meta", "its tensors are on the meta device, without values; load the weights, then save"),
    ("torch._utils._rebuild_wrapper", "it holds tensors of a class of their own; save the plain model before wrapping"),
    ("torchao", "quantised models cannot be converted; start from the float model"),
    ("bitsandbytes", "quantised models cannot be converted; start from the float model"),
    ("torch.ao", "quantised models cannot be converted; start from the float model"),
    ("torch.nn.quantized", "quantised models cannot be converted; start from the float model"),
    ("torch.nn.intrinsic", "quantised models cannot be converted; start from the float model"),
    ("torch._utils._rebuild_qtensor", "quantised models cannot be converted; start from the float model"),
    ("torch.optim.swa_utils", "save the averaged network itself (model.module)"),
    ("torch.nn.parallel", "save the network inside the wrapper (model.module)"),
    ("torch.distributed", "save the network inside the wrapper, gathered on one process"),
    ("torch.nn.utils.prune", "make the pruning permanent (torch.nn.utils.prune.remove), then save again"),
    ("torch.nn.utils.weight_norm", "remove it (torch.nn.utils.remove_weight_norm), then save again"),
    ("torch.nn.utils.spectral_norm", "remove it (torch.nn.utils.remove_spectral_norm), then save again"),
    ("torch.nn.parameter.Uninitialized", "run the model once so that its lazy layers have weights, then save again"),
    ("torch.utils.hooks", "remove the hooks, then save again"),
    ("torch.storage._load_from_bytes", "it was written by pickle.dump; write it with torch.save"),
    ("torch.nn.backends", "it was saved by a very old torch; save its state dict and name a factory with --arch"),
    ("functools.partial", "a partial is a call; save the state dict and name a factory with --arch"),
    ("numpy", "turn numpy values among the model's attributes into plain numbers, or save the state dict"),
)  # fmt: skip


def inside(module: str, packages: tuple[str, ...] | frozenset[str]) -> bool:
    """Whether a module is one of these packages or lies in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def may_be_trusted(package: str) -> bool:
    """Whether `--trust` takes a package, or that of a `package.module:function`; a command line's own module
    (`__main__`) never is one of models."""
    parts = package.partition(":")[0].split(".")
    return all(part.isidentifier() for part in parts) and parts[0] not in NO_MODELS and "__main__" not in parts


def class_allowed(module: str, name: str, trust: tuple[str, ...] = ()) -> bool:
    """Whether a class of this name may be rebuilt from a file, as far as its name tells."""
    full = f"{module}.{name}"
    if full in DENIED_CLASSES or "__" in name or not all(part.isidentifier() for part in full.split(".")):
        return False
    if module == "__main__" or module.split(".")[0] in sys.stdlib_module_names:
        return False
    return inside(module, CLASS_PACKAGES) or module in CLASS_MODULES or inside(module, trust)


def unread(module: str) -> bool:
    """Whether a checkpoint may carry this name in an entry that nobody reads."""
    return inside(module, UNREAD_PACKAGES)


def hint(module: str, name: str) -> str:
    """The next step for a refused name."""
    full = f"{module}.{name}"
    for start, text in HINTS:
        if full.startswith(start):
            return text
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or f"{module}.{name}" in DENIED_CLASSES or "__" in name:
        return "no flag allows it. Save the state dict and name a factory with --arch"
    if top == "torch":
        return "no flag is meant for torch's own inner code. Save the state dict and name a factory with --arch"
    if not may_be_trusted(module) or not all(part.isidentifier() for part in name.split(".")):
        return "no flag allows it. Save the state dict and name a factory with --arch"
    return f"if you trust the package, add --trust {top}; or save the state dict and name a factory with --arch"
