"""Projection: between a teacher's key/value space and the student's."""

from kvdistill.distill.projection.bottleneck import BottleneckProjection
from kvdistill.distill.projection.closed_form import initialise
from kvdistill.distill.projection.layerwise import FullProjection
from kvdistill.distill.projection.linear import LinearProjection
from kvdistill.distill.projection.moments import PilotMoments
from kvdistill.distill.projection.regression import StudentToTeacher
from kvdistill.distill.projection.shapes import HeadShape, check_kv
from kvdistill.distill.projection.shared_space import SpaceAdapter
from kvdistill.distill.projection.standardise import ChannelStatistics, Standardise

__all__ = [
    "BottleneckProjection",
    "ChannelStatistics",
    "FullProjection",
    "HeadShape",
    "LinearProjection",
    "PilotMoments",
    "SpaceAdapter",
    "Standardise",
    "StudentToTeacher",
    "check_kv",
    "initialise",
]
