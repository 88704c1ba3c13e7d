"""The choice of the dynamic_mask: scores, schedule, exact counts."""

from padconvert.partition.partitioner import Partitioner, Round

__all__ = ["Partitioner", "Round"]
