"""Errors of Hadoop as errors of a store."""

from __future__ import annotations

from dataclasses import dataclass

from asymcheck.errors import (
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnavailableError,
)

# Simple names of Java's exceptions that tell what to do next.
FILE_NOT_FOUND = "FileNotFoundException"
FILE_EXISTS = "FileAlreadyExistsException"
NOT_EMPTY = "PathIsNotEmptyDirectoryException"
PARENT_IS_FILE = "ParentNotDirectoryException"

# Kinds of failure for which Java has no name of its own.
UNREACHABLE = "unreachable"
TIMED_OUT = "timed out"
NO_DATANODE = "no DataNode"
LOST_TEMPORARY = "lost temporary"
DIRECTORY_IN_PLACE = "directory in place"
UNSUPPORTED = "unsupported"
CLIENT_FAILED = "client failed"

_TEXTS = {  # where Java's exception is one that tells less
    "could only be written to": NO_DATANODE,
    "could only be replicated to": NO_DATANODE,
    "are bad. Aborting": NO_DATANODE,
    "does not have enough number of replicas": NO_DATANODE,
    "suggest to check cluster health": NO_DATANODE,
    "is not a directory)": PARENT_IS_FILE,
    "must both be directories": DIRECTORY_IN_PLACE,
}


class HadoopError(Exception):
    """What a server, or the way to it, answered instead of doing what it was asked.

    Attributes:
        kind: the simple name of Java's exception, or one of the kinds above.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = next((told for text, told in _TEXTS.items() if text in message), kind)


@dataclass(frozen=True, slots=True)
class _Meaning:
    error: type[StoreError]
    hint: str | None = None


_QUOTA = "Raise the quota (hdfs dfsadmin) or free space under it; what was stored is intact"
_RIGHTS = (
    "Check owner and mode of the directory, and who you are for HDFS: "
    "HADOOP_USER_NAME, or your Kerberos ticket"
)
_WAY = "Check that the servers run, the address, and the network between"
_STANDBY = "Name the nameservice, with HADOOP_CONF_DIR set, or the active NameNode"
_FULL = _Meaning(StoreFullError, _QUOTA)
_FORBIDDEN = _Meaning(StorePermissionError, _RIGHTS)
_AWAY = _Meaning(StoreUnavailableError, _WAY)

_MEANINGS = {
    FILE_NOT_FOUND: _Meaning(ObjectNotFoundError),
    PARENT_IS_FILE: _Meaning(StoreError, "An object lies where a directory should be"),
    DIRECTORY_IN_PLACE: _Meaning(StoreError, "A directory lies where the object should be"),
    "DSQuotaExceededException": _FULL,
    "NSQuotaExceededException": _FULL,
    "QuotaByStorageTypeExceededException": _FULL,
    "QuotaExceededException": _FULL,
    "AccessControlException": _FORBIDDEN,
    "AuthorizationException": _FORBIDDEN,
    "InvalidToken": _FORBIDDEN,
    "SaslException": _FORBIDDEN,
    "SecurityException": _FORBIDDEN,
    "GSSException": _FORBIDDEN,
    "SASLError": _FORBIDDEN,
    "GSSAPIError": _FORBIDDEN,
    "NoSASLMechanism": _FORBIDDEN,
    UNREACHABLE: _AWAY,
    TIMED_OUT: _Meaning(StoreUnavailableError, f"{_WAY}, or raise the option timeout_s"),
    NO_DATANODE: _Meaning(
        StoreUnavailableError,
        "No DataNode takes the block: check that they run and have room (hdfs dfsadmin -report)",
    ),
    LOST_TEMPORARY: _Meaning(StoreUnavailableError, "Somebody removes files in .tmp"),
    "BlockMissingException": _Meaning(
        StoreUnavailableError, "No DataNode has the block: start them, or see hdfs fsck"
    ),
    "DataTransferError": _AWAY,
    "IOException": _AWAY,  # of which there are too many to tell them apart; few of them stay
    "LeaseExpiredException": _Meaning(StoreUnavailableError, "Somebody removes files in .tmp"),
    "NotReplicatedYetException": _AWAY,
    "OperationFailed": _AWAY,
    "RecoveryInProgressException": _AWAY,
    # What a DataNode met on its way to others, when it answers for them over HTTP.
    "ClosedChannelException": _AWAY,
    "ConnectException": _AWAY,
    "ConnectTimeoutException": _AWAY,
    "EOFException": _AWAY,
    "NoRouteToHostException": _AWAY,
    "SocketException": _AWAY,
    "SocketTimeoutException": _AWAY,
    "RetriableException": _AWAY,
    "SafeModeException": _Meaning(
        StoreUnavailableError,
        "The NameNode is read-only: it waits for DataNodes, or for hdfs dfsadmin -safemode leave",
    ),
    "StandbyException": _Meaning(StoreUnavailableError, _STANDBY),
    UNSUPPORTED: _Meaning(StoreError, "See 'HDFS' in docs/stores.md"),
}


def is_passing(error: HadoopError) -> bool:
    """Whether the same request may succeed later."""
    return _meaning(error).error is StoreUnavailableError


def store_error(action: str, url: str, key: str | None, error: HadoopError) -> StoreError:
    """The error to raise for one that stays."""
    meaning = _meaning(error)
    if meaning.error is ObjectNotFoundError:
        return ObjectNotFoundError(f"no such object in {url}", object=key)
    text = str(error).partition("\n")[0]
    return meaning.error(
        f"cannot {action} in {url}: {error.kind}: {text}", object=key, hint=meaning.hint
    )


def _meaning(error: HadoopError) -> _Meaning:
    return _MEANINGS.get(error.kind, _Meaning(StoreError))
