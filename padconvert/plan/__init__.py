"""Infos + policy → `Plan`: the full list of decisions, made before anything is touched. No tensors."""

from padconvert.plan.cost import ITEMSIZE, TensorSizes
from padconvert.plan.count import exact_count
from padconvert.plan.decide import make_plan
from padconvert.plan.explain import explain_layer
from padconvert.plan.file import check_plan_fits, check_plan_terms, plan_from_json, plan_to_json, read_plan
from padconvert.plan.model import Cost, LayerChoice, LayerPlan, Plan, Pool, Route

__all__ = [
    "ITEMSIZE",
    "Cost",
    "LayerChoice",
    "LayerPlan",
    "Plan",
    "Pool",
    "Route",
    "TensorSizes",
    "check_plan_fits",
    "check_plan_terms",
    "exact_count",
    "explain_layer",
    "make_plan",
    "plan_from_json",
    "plan_to_json",
    "read_plan",
]
