"""How tests start Java."""

from __future__ import annotations

# the quick compiler: no test runs long enough for the other. With that one alone Java takes a small
# space for its code, and is always clearing it
QUICK_JAVA = "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:+UseSerialGC"
