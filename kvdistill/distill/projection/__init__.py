"""Projection: between a teacher's key/value space and the student's."""

from kvdistill.distill.projection.linear import LinearProjection
from kvdistill.distill.projection.regression import StudentToTeacher
from kvdistill.distill.projection.shapes import HeadShape, check_kv
from kvdistill.distill.projection.standardise import ChannelStatistics, Standardise

__all__ = [
    "ChannelStatistics",
    "HeadShape",
    "LinearProjection",
    "Standardise",
    "StudentToTeacher",
    "check_kv",
]
