"""What every transport offers: frames to write, a way to send them, and a way to wait for those of the others."""

from typing import NamedTuple, Protocol

from torch import Tensor

from syncnorm.comm.frames import Frames, Header

SLOTS = (
    4  # buffers of a transport for frames of one size: so many transfers may not have arrived, the newest included
)


class Transfer(Protocol):
    """A frame that this rank has sent, and those that it is to receive with it."""

    def arrived(self, seconds: float) -> bool:
        """Waits until the frames of all ranks are there, at most about ``seconds``; whether they are.

        Raises:
            RuntimeError: they will never be: a rank has died, the time of the group is up, or the transport failed.
        """

    def delivered(self) -> bool:
        """Whether the other ranks receive this rank's frame even if this process ends now."""

    def leave(self) -> None:
        """Sees to it that the other ranks receive this rank's frame although it does not wait for theirs now."""


class Swapped(NamedTuple):
    """A transfer that has been sent and, usually, received.

    Attributes:
        frames: of the transfer.
        transfer: the transfer.
        values: the last field of each rank's header, if all frames have arrived and belong to the same call; None if
            that is still to be waited for and checked.
    """

    frames: Frames
    transfer: Transfer
    values: list[int] | None


class Transport(Protocol):
    """The connections of one rank of a group. All ranks must send frames of the same capacity, in the same order."""

    @property
    def description(self) -> str:
        """For tables and error messages: how frames travel, and between how many ranks."""

    def frames(self, capacity: int) -> Frames:
        """The frames of the next transfer, of at least ``capacity`` bytes each.

        At most ``SLOTS - 1`` transfers may be sent and not have arrived when this is called.
        """

    def send(self, frames: Frames) -> Transfer:
        """Sends the frame that this rank has written. Raises a RuntimeError if the transport failed."""

    def swap(self, capacity: int, header: Header, vector: Tensor) -> Swapped | None:
        """Sends a frame and waits a moment for those of the others, with less work for the host than in steps.

        Args:
            capacity: as of :meth:`frames`, the same on all ranks. It alone decides which way a frame travels, because
                ranks that disagree may have payloads of different sizes.
            header: of this rank's frame.
            vector: its payload, on the CPU, without gaps.

        Returns:
            None, and nothing has been sent, if the transport has no such way for this frame.
        """
