"""Where the teacher's distribution comes from."""

from kd_lightning.models.backbone import body_and_head
from kd_lightning.teachers.adapter_off import AdapterOffTeacher
from kd_lightning.teachers.base import Teacher
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.hf import HFTeacher
from kd_lightning.teachers.offloaded import OffloadedTeacher
from kd_lightning.teachers.routed import RoutedTeacher
from kd_lightning.teachers.self_teacher import SelfTeacher
from kd_lightning.teachers.served import ServerTeacher

__all__ = [
    "AdapterOffTeacher",
    "CachedTeacher",
    "HFTeacher",
    "OffloadedTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "ServerTeacher",
    "Teacher",
    "body_and_head",
]
