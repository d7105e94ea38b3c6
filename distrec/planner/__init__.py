"""What a training run will cost, before it is run: no Spark, no Horovod, no tables."""

from distrec.planner.plan import Report, Sizer, plan_run
from distrec.planner.show import as_json, show
from distrec.planner.units import parse_bandwidth, parse_bytes

__all__ = ["Report", "Sizer", "as_json", "parse_bandwidth", "parse_bytes", "plan_run", "show"]
