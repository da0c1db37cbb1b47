"""DeepGEMM's names over this package's GEMMs, scale layouts and knobs, for clients written against ``deep_gemm``.

``from megamoe.adapters import deep_gemm``, or ``deep_gemm.install()`` first, so that a client's own ``import
deep_gemm`` finds it. Names of DeepGEMM that are not here are absent, so that clients that probe for them take another
way. Positional order is DeepGEMM's as far as its forks agree; what follows is by keyword, and a keyword whose value
would change the result in a way that is not done here is a ValueError.
"""

from megamoe.adapters.deep_gemm import utils
from megamoe.adapters.deep_gemm.gemms import (
    bf16_gemm_nn,
    bf16_gemm_nt,
    bf16_gemm_tn,
    bf16_gemm_tt,
    bf16_m_grouped_gemm_nt_masked,
    fp8_gemm_nn,
    fp8_gemm_nt,
    fp8_gemm_tn,
    fp8_gemm_tt,
    fp8_m_grouped_gemm_nt_masked,
    k_grouped_bf16_gemm_tn_contiguous,
    k_grouped_fp8_gemm_nt_contiguous,
    k_grouped_fp8_gemm_tn_contiguous,
    m_grouped_bf16_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nt_masked,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from megamoe.adapters.deep_gemm.installed import install, uninstall
from megamoe.adapters.deep_gemm.knobs import (
    get_num_sms,
    get_pdl,
    get_tc_util,
    set_num_sms,
    set_pdl,
    set_tc_util,
)
from megamoe.adapters.deep_gemm.mega import (
    SymmBuffer,
    bf16_mega_moe,
    fp8_mega_moe,
    get_symm_buffer_for_mega_moe,
    mega_moe_pre_dispatch_sm90,
    transform_weights_for_mega_moe,
    transform_weights_for_mega_moe_sm90,
)
from megamoe.adapters.deep_gemm.utils.layout import (
    get_m_alignment_for_contiguous_layout,
    get_mk_alignment_for_contiguous_layout,
    get_mn_major_tma_aligned_packed_ue8m0_tensor,
    get_mn_major_tma_aligned_tensor,
    get_tma_aligned_size,
    transform_sf_into_required_layout,
)
from megamoe.adapters.deep_gemm.utils.math import align, ceil_div

__all__ = [
    "SymmBuffer",
    "align",
    "bf16_gemm_nn",
    "bf16_gemm_nt",
    "bf16_gemm_tn",
    "bf16_gemm_tt",
    "bf16_m_grouped_gemm_nt_masked",
    "bf16_mega_moe",
    "ceil_div",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fp8_m_grouped_gemm_nt_masked",
    "fp8_mega_moe",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "get_num_sms",
    "get_pdl",
    "get_symm_buffer_for_mega_moe",
    "get_tc_util",
    "get_tma_aligned_size",
    "install",
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "mega_moe_pre_dispatch_sm90",
    "set_num_sms",
    "set_pdl",
    "set_tc_util",
    "transform_sf_into_required_layout",
    "transform_weights_for_mega_moe",
    "transform_weights_for_mega_moe_sm90",
    "uninstall",
    "utils",
]
