"""The mathematics of pruning in pure torch. Each function cites its equation and gives shapes."""

from atp_patch.maths.budget import (
    average_tokens,
    keep_counts,
    minimum_target,
    paper_proportions,
    starting_thresholds,
    target_counts,
)
from atp_patch.maths.duplicates import suppress, without_duplicates
from atp_patch.maths.flops import (
    kv_bytes,
    layer_flops,
    paper_flops_reduction,
    paper_layer_flops,
    prefill_flops,
)
from atp_patch.maths.indexing import (
    descending_rank,
    gather_heads,
    gather_tokens,
    local_index,
    pack,
    ranked,
    scatter_tokens,
    top_k_mask,
)
from atp_patch.maths.losses import atp_loss, layer_averages, target_loss
from atp_patch.maths.merging import (
    even_counts,
    even_targets,
    merge_weights,
    nearest_target,
    outliers,
    shrunk_grid,
    spread_supplement,
)
from atp_patch.maths.principal import principal_loadings
from atp_patch.maths.rope import rotary_frequencies, turn_by_place
from atp_patch.maths.scores import (
    cross_rows,
    cross_scores,
    normalise_scores,
    redundant_scores,
    self_scores,
    standardise_scores,
    visible_keys,
)
from atp_patch.maths.selection import (
    cosine_similarities,
    coverage_selection,
    determinantal_selection,
    max_min_selection,
)
from atp_patch.maths.sparse import attention_rank, cluster_weights, density_peaks, raters
from atp_patch.maths.spatial import progressive_order, spatial_scores, to_reference_grid
from atp_patch.maths.thresholds import (
    budget_thresholds,
    hard_keep,
    soft_mask,
    straight_through_mask,
)
from atp_patch.maths.voco_sequence import (
    VoCoSequence,
    insert_voco_tokens,
    output_columns,
    voco_visible,
)

__all__ = [
    "VoCoSequence",
    "atp_loss",
    "attention_rank",
    "average_tokens",
    "budget_thresholds",
    "cluster_weights",
    "cosine_similarities",
    "coverage_selection",
    "cross_rows",
    "cross_scores",
    "density_peaks",
    "descending_rank",
    "determinantal_selection",
    "even_counts",
    "even_targets",
    "gather_heads",
    "gather_tokens",
    "hard_keep",
    "insert_voco_tokens",
    "keep_counts",
    "kv_bytes",
    "layer_averages",
    "layer_flops",
    "local_index",
    "max_min_selection",
    "merge_weights",
    "minimum_target",
    "nearest_target",
    "normalise_scores",
    "outliers",
    "output_columns",
    "pack",
    "paper_flops_reduction",
    "paper_layer_flops",
    "paper_proportions",
    "prefill_flops",
    "principal_loadings",
    "progressive_order",
    "ranked",
    "raters",
    "redundant_scores",
    "rotary_frequencies",
    "scatter_tokens",
    "self_scores",
    "shrunk_grid",
    "soft_mask",
    "spatial_scores",
    "spread_supplement",
    "standardise_scores",
    "starting_thresholds",
    "straight_through_mask",
    "suppress",
    "target_counts",
    "target_loss",
    "to_reference_grid",
    "top_k_mask",
    "turn_by_place",
    "visible_keys",
    "voco_visible",
    "without_duplicates",
]
