"""Who is told how long this rank waited for the others in an exchange: nobody, unless a monitor samples a step."""

from collections.abc import Callable

from syncnorm.comm.call import Call

# Each called with the call and the seconds waited, in the thread that waited.
observers: list[Callable[[Call, float], None]] = []
