"""What a graph on disk may call: a fixed table of ATen operators, and a few functions of sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from dcc.capture.sizes import LARGEST, power
from dcc.errors import CaptureError
from dcc.torch_internals import OpOverload, number_at_capture, schema

ATEN = frozenset(  # none of them reads or writes a file, loads code or waits for anything
    """
    __and__ __or__ __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _addmm_activation _assert_async _assert_scalar
    _assert_tensor_metadata _batch_norm_impl_index _cast_Byte _cast_Char _cast_Double _cast_Float _cast_Half
    _cast_Int _cast_Long _cast_Short _cdist_forward _conj _conj_physical _convolution _efficient_attention_forward
    _embedding_bag _embedding_bag_forward_only _euclidean_dist _flash_attention_forward _fused_rms_norm _grouped_mm
    _int_mm _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex _linalg_svd _log_softmax _masked_softmax
    _native_batch_norm_legit_no_training _native_multi_head_attention _neg_view _pad_circular _pad_enum
    _prelu_kernel _reshape_alias _safe_softmax _scaled_dot_product_attention_math
    _scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable _scaled_grouped_mm
    _scaled_mm _shape_as_tensor _softmax _stack _to_copy _transformer_encoder_layer_fwd _trilinear _unsafe_index
    _unsafe_index_put _unsafe_masked_index _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_int4pack_mm
    _weight_int8pack_mm _weight_norm _weight_norm_interface abs absolute acos acosh adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add addbmm
    addcdiv addcmul addmm addmv addr adjoint affine_grid_generator alias all alpha_dropout amax amin aminmax angle
    any arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort as_strided
    as_strided_scatter asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d
    baddbmm bartlett_window batch_norm bernoulli bilinear bincount bitwise_and bitwise_left_shift bitwise_not
    bitwise_or bitwise_right_shift bitwise_xor blackman_window block_diag bmm broadcast_tensors broadcast_to
    bucketize cartesian_prod cat cdist ceil celu chain_matmul channel_shuffle cholesky chunk clamp clamp_max
    clamp_min clip clone col2im column_stack combinations complex concat concatenate conj conj_physical
    constant_pad_nd contiguous conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d
    convolution copy copysign cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum deg2rad
    det detach diag diag_embed diagflat diagonal diagonal_scatter diff digamma dist div divide dot dropout dsplit
    dstack einsum elu embedding embedding_bag empty empty_like empty_permuted empty_strided eq erf erfc erfinv exp
    exp2 expand expand_as expm1 exponential eye feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftfreq
    fft_fftn fft_fftshift fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft
    fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill fix flatten
    flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac frobenius_norm full full_like gather gcd
    ge gelu ger glu gradient greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru
    gru_cell gt hamming_window hann_window hardshrink hardsigmoid hardswish hardtanh heaviside histc hsplit hstack
    hypot i0 igamma igammac im2col imag index index_add index_fill index_put index_reduce index_select inner
    instance_norm inverse isclose isfinite isin isinf isnan isneginf isposinf isreal istft kaiser_window kron
    kthvalue l1_loss layer_norm lcm ldexp le leaky_relu lerp less less_equal lgamma lift lift_fresh lift_fresh_copy
    linalg_cholesky linalg_cholesky_ex linalg_cross linalg_det linalg_diagonal linalg_eig linalg_eigh linalg_eigvals
    linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_lu linalg_lu_factor
    linalg_lu_factor_ex linalg_lu_solve linalg_matmul linalg_matrix_exp linalg_matrix_norm linalg_matrix_power
    linalg_matrix_rank linalg_multi_dot linalg_norm linalg_pinv linalg_qr linalg_slogdet linalg_solve
    linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals linalg_vander linalg_vecdot linalg_vector_norm
    linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp logdet
    logical_and logical_not logical_or logical_xor logit logspace logsumexp lstm lstm_cell lt mH mT masked_fill
    masked_scatter matmul matrix_H matrix_exp matrix_power max max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d maximum mean median
    meshgrid min minimum mish mm mode moveaxis movedim mse_loss msort mul multinomial multiply mv mvlgamma
    nan_to_num nanmean nanmedian nanquantile nansum narrow native_batch_norm native_channel_shuffle native_dropout
    native_group_norm native_layer_norm ne neg negative new_empty new_empty_strided new_full new_ones new_zeros
    nextafter norm normal normal_functional not_equal nuclear_norm numel numpy_T one_hot ones ones_like outer pad
    pad_sequence pairwise_distance pdist permute pinverse pixel_shuffle pixel_unshuffle polar polygamma positive pow
    prelu prod put qr quantile rad2deg rand rand_like randint randint_like randn randn_like randperm range ravel
    real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder renorm repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as resolve_conj
    resolve_neg rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell roll rot90 round row_stack rrelu rsqrt rsub
    scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select select_scatter
    selu sgn sigmoid sign signbit silu sin sinc sinh size slice slice_scatter slogdet smooth_l1_loss softmax
    softplus softshrink sort special_digamma special_entr special_erf special_erfc special_erfcx special_erfinv
    special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln special_i0
    special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_log_softmax special_logit
    special_logsumexp special_ndtr special_ndtri special_polygamma special_psi special_round special_sinc
    special_softmax special_xlog1py special_xlogy special_zeta split split_with_sizes sqrt square squeeze stack std
    std_mean stft stride sub subtract sum sum_to_size svd swapaxes swapdims sym_constrain_range
    sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride t take take_along_dim tan tanh
    tensor_split tensordot threshold tile to topk trace transpose trapezoid trapz triangular_solve tril tril_indices
    triu triu_indices true_divide trunc type_as unbind unflatten unfold uniform unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_trilinear3d vander var var_mean vdot view view_as view_as_complex
    view_as_real vsplit vstack where xlogy zero zeros zeros_like
    """.split()
)
SIZE_FUNCTIONS: Mapping[str, Callable[..., Any]] = {  # on sizes, and on what an operator returns several of
    **{
        f"operator.{function.__name__}": function
        for function in (
            *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod),
            *(operator.pow, operator.neg, operator.pos, operator.and_, operator.or_, operator.getitem),
            *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        )
    },
    **{f"math.{function.__name__}": function for function in (math.ceil, math.floor, math.trunc, math.sqrt)},
    **{f"builtins.{function.__name__}": function for function in (abs, max, min, round)},
    **{
        f"torch.{function.__name__}": function
        for function in (torch.sym_float, torch.sym_int, torch.sym_ite, torch.sym_max, torch.sym_min, torch.sym_not)
    },
}
_NAMES = {function: name for name, function in SIZE_FUNCTIONS.items()}


def name_of(target: Any) -> str:
    """The name under which `target_of` finds it again. Raises CaptureError for what is in neither table."""
    name = str(target) if isinstance(target, OpOverload) else _NAMES.get(target) if callable(target) else None
    if name is None or target_of(name) is not target:
        raise CaptureError(f"a file cannot hold a call of {target}")
    return name


def target_of(name: Any) -> Callable[..., Any]:
    """The operator `aten.add.Tensor` or the function `operator.getitem`. Raises CaptureError for any other name."""
    if isinstance(name, str) and name in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[name]
    namespace, operation, overload = name.split(".") if isinstance(name, str) and name.count(".") == 2 else ("",) * 3
    packet = getattr(torch.ops.aten, operation, None) if namespace == "aten" and operation in ATEN else None
    if packet is None or overload not in packet.overloads():
        raise CaptureError(f"{name!r} is no operator that a file may call")
    found = getattr(packet, overload)
    if schema(found).is_mutable:
        raise CaptureError(f"{name!r} writes to its arguments, which no graph does")
    return found


def check_call_of_sizes(node: Node) -> None:
    """Checks what a call of SIZE_FUNCTIONS says that it returns, and that it stays within 64 bits.

    Python's own whole numbers have no bound, so a few such calls could take hours. Raises CaptureError.
    """
    if node.op != "call_function" or node.target not in _NAMES or node.target is operator.getitem:
        return
    arguments = [_at_capture(argument) for argument in node.args]
    function: Any = power if node.target is operator.pow else node.target
    try:
        value = function(*arguments)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CaptureError(f"{node.name!r} cannot be computed: {error}") from error
    if node.kwargs or not abs(value) <= LARGEST or not math.isclose(value, _at_capture(node), rel_tol=1e-12):
        raise CaptureError(f"{node.name!r} is {value!r:.40} at capture, which is not what the file says")


def _at_capture(value: Any) -> Any:
    """The number that an argument or the value of a node had at capture. Raises CaptureError where it is none."""
    if isinstance(value, list | tuple):
        return [_at_capture(item) for item in value]
    number = number_at_capture(value.meta.get("val") if isinstance(value, Node) else value)
    if number is None:
        raise CaptureError(f"{value} is no number, which a function of sizes takes")
    return number
