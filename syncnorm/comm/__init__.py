"""Communication between ranks; the only package that sends tensors.

A synced layer makes two collectives (``collectives``): one gather in the forward, one sum in the backward. On CPUs
over gloo each is an ``exchange`` of ``frames`` whose headers ranks compare, through one of the ``transports``.
Elsewhere, or if chosen, they are the ``native`` gather and all_reduce of torch.distributed, and frames only compare.
"""

from syncnorm.comm.call import Call, Kind
from syncnorm.comm.collectives import (
    Gathered,
    Peers,
    abort_peers,
    abort_peers_with,
    aborting_peers,
    exchange_of,
    gather_moments,
    gather_sums,
    native_call,
    peers_of,
    reduce_sums,
    reopen,
    set_transport,
    transport_of,
)
from syncnorm.comm.exchange import Exchange
from syncnorm.comm.native import NativeCall, set_debug
from syncnorm.comm.transports import TransportName

__all__ = [
    "Call",
    "Exchange",
    "Gathered",
    "Kind",
    "NativeCall",
    "Peers",
    "TransportName",
    "abort_peers",
    "abort_peers_with",
    "aborting_peers",
    "exchange_of",
    "gather_moments",
    "gather_sums",
    "native_call",
    "peers_of",
    "reduce_sums",
    "reopen",
    "set_debug",
    "set_transport",
    "transport_of",
]
