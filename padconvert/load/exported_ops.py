"""Which operations a program may hold: tensor operations without any effect outside the tensors, by written list.

Not "all of aten": that namespace also holds `from_file`, which opens any file, `save`, which writes one, and `set_` and
`as_strided`, which look beside a tensor. A name of the list also allows its in-place form (`relu`, `relu_`).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from padconvert.errors import FileError, printable

_ATEN = """
__and__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async _assert_scalar
_assert_tensor_metadata _cdist_forward _embedding_bag _euclidean_dist _fused_rms_norm _local_scalar_dense _log_softmax
_native_batch_norm_legit _native_batch_norm_legit_no_training _native_multi_head_attention _pdist_forward
_prelu_kernel _reshape_alias _safe_softmax _scaled_dot_product_flash_attention_for_cpu _shape_as_tensor _softmax
_to_copy _transformer_encoder_layer_fwd _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm _weight_norm_interface abs
absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv addr adjoint affine_grid_generator
alias all alpha_dropout amax amin aminmax angle any arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax
argmin argsort asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm
batch_norm bernoulli bilinear bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
block_diag bmm broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist ceil celu channel_shuffle cholesky
chunk clamp clamp_max clamp_min clip clone col2im column_stack complex concat concatenate conj conj_physical
constant_pad_nd contiguous conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution
copy copysign cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum deg2rad detach diag
diag_embed diagonal diagonal_scatter diff digamma dist div divide dot dropout dsplit dstack einsum elu embedding
embedding_bag empty empty_like empty_permuted eq equal erf erfc erfinv exp exp2 expand expand_as expm1 eye
feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2
fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill fix
flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac frobenius_norm full full_like gather ge
gelu glu greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gt hann_window hardshrink
hardsigmoid hardswish hardtanh heaviside hsplit hstack hypot i0 im2col imag index index_add index_copy index_fill
index_put index_select inner instance_norm inverse isclose isfinite isin isinf isnan isneginf isposinf item kron
kthvalue layer_norm ldexp le leaky_relu lerp less less_equal lgamma lift lift_fresh lift_fresh_copy linalg_cholesky
linalg_cross linalg_det linalg_inv linalg_matrix_norm linalg_norm linalg_qr linalg_solve linalg_svd linalg_vecdot
linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp
logical_and logical_not logical_or logical_xor logit logspace logsumexp lstm lt mH mT masked_fill masked_scatter
masked_select matmul matrix_exp matrix_power max max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d maximum mean median meshgrid min minimum mish mm mode
moveaxis movedim mul multinomial multiply mv nan_to_num nanmean nansum narrow native_batch_norm native_dropout
native_group_norm native_layer_norm ne neg negative new_empty new_full new_ones new_zeros nonzero nonzero_numpy norm
normal not_equal numel numpy_T one_hot ones ones_like outer pad pairwise_distance permute pixel_shuffle
pixel_unshuffle polar polygamma positive pow prelu prod quantile rad2deg rand rand_like randint randint_like randn
randn_like randperm range ravel real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder
renorm repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as rms_norm
rnn_relu rnn_tanh roll rot90 round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add
scatter_reduce searchsorted select select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh slice slice_scatter
softmax softplus softshrink sort special_entr special_erf special_expit special_expm1 special_log1p special_log_softmax
special_logit special_logsumexp special_ndtr special_sinc special_softmax special_xlogy split split_with_sizes sqrt
square squeeze stack std std_mean stft sub subtract sum swapaxes swapdims sym_constrain_range
sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride t take take_along_dim tan tanh
tensor_split tensordot threshold tile to topk trace transpose tril tril_indices triu triu_indices true_divide trunc
type_as unbind unflatten unfold uniform unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze upsample_bicubic2d
upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
vander var var_mean vdot view view_as view_as_complex view_as_real vsplit vstack where xlogy zero zeros zeros_like
"""
ATEN = frozenset(_ATEN.split())

# Arithmetic on shapes.
SHAPE_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name)
       for name in ("add", "and_", "eq", "floordiv", "ge", "gt", "le", "lt", "mod", "mul", "ne", "neg", "or_",
                    "pos", "rshift", "sub", "truediv")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": getattr(torch, name)
       for name in ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not")},
}  # fmt: skip

# They give nothing, or check what was true at the export: another precision or device is no mistake here.
DROPPED = frozenset({"aten._assert_tensor_metadata.default", "aten.promote_types.default"})

_OVERLOAD = re.compile(r"aten\.(\w+)\.(\w+)\Z", re.ASCII)


def is_allowed(name: str) -> bool:
    """Whether an operation of this name, as `aten.conv2d.default`, may be part of a program."""
    if name in SHAPE_OPERATIONS:
        return True
    match = _OVERLOAD.match(name)
    if match is None or "__" in match[2]:
        return False
    return match[1] in ATEN or (match[1].endswith("_") and match[1][:-1] in ATEN)


def operation(name: str) -> Callable[..., Any] | None:
    """The operation of an allowed name; None where this torch has none."""
    if name in SHAPE_OPERATIONS:
        return SHAPE_OPERATIONS[name]
    _, packet, overload = name.split(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def check_operators(version: object, where: str) -> None:
    """Raises FileError for operators of a version that this torch does not know."""
    newest = torch._C._get_max_operator_version()
    if type(version) is not int or not 1 <= version <= newest:
        raise FileError(
            f"{where}: exported with operators of version {printable(repr(version))[:40]}, and torch "
            f"{torch.__version__} knows 1 to {newest}. Update torch, or export the model again with this one."
        )
