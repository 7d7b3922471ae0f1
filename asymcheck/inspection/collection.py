"""`asymcheck gc`: removes what dead runs left behind."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from asymcheck.inspection.text import size
from asymcheck.lease import removing
from asymcheck.retention import collect_orphans, survey
from asymcheck.stores import LocalStore
from asymcheck.stores.base import Guarantees, Store
from asymcheck.stores.filesystem import Filesystem


@dataclass(frozen=True)
class Collection:
    """What was removed, or (`dry_run`) would be.

    `leases` are those of dead runs, `temporaries` counts unfinished files of dead writers. The
    store protocol does not tell lengths, so `nbytes` is known for local stores only. While a
    commit record is damaged (`damaged_steps`) no object is removed: it might name them.
    """

    url: str
    dry_run: bool
    objects: list[str]
    leases: list[str]
    temporaries: int
    nbytes: int | None
    damaged_steps: list[int]

    def text(self) -> Iterator[str]:
        """What was removed, one object a line, and a summary."""
        yield from (*self.objects, *self.leases)
        verb = "would remove" if self.dry_run else "removed"
        freed = "" if self.nbytes is None else f", {size(self.nbytes)}"
        yield (
            f"{verb} {len(self.objects)} objects, {len(self.leases)} leases, "
            f"{self.temporaries} temporary files{freed}"
        )
        if self.damaged_steps:
            yield (
                f"the commit records of steps {', '.join(map(str, self.damaged_steps))} are "
                "damaged: no object is removed, because they might name it"
            )


def collect(store: Store, *, dry_run: bool) -> Collection:
    """Remove objects of attempts that were never committed, unless their run is alive.

    Safe beside runs that are training: a run holds a lease while it lives.

    Raises:
        StoreError: the store failed; what was removed until then stays removed.
    """
    damaged = [step for step, found in survey(store).items() if found.attempt is None]
    filesystem = _CountingFilesystem(dry_run)
    local = LocalStore(_root(store), filesystem) if isinstance(store, LocalStore) else None
    recording = _RecordingStore(local or store, keep=dry_run and local is None)
    with nullcontext() if dry_run else removing(store):
        objects = collect_orphans(recording)
    return Collection(
        store.url,
        dry_run,
        objects,
        sorted(set(recording.deleted) - set(objects)),
        recording.temporaries,
        None if local is None else filesystem.freed_nbytes,
        damaged,
    )


def _root(store: LocalStore) -> Path:
    return Path(unquote(urlsplit(store.url).path))


class _CountingFilesystem(Filesystem):
    """Counts the bytes of the files that are removed; in a dry run none is, nor a directory."""

    def __init__(self, dry_run: bool) -> None:
        self._dry_run = dry_run
        self.freed_nbytes = 0

    def unlink(self, path: Path) -> None:
        """Count, and remove."""
        self.freed_nbytes += self.status(path).nbytes
        if not self._dry_run:
            super().unlink(path)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        if self._dry_run:
            raise OSError(errno.ENOTEMPTY, "kept in a dry run", str(path))
        super().remove_directory(path)


class _RecordingStore:
    """A store that notes what is deleted from it, and keeps it if `keep`."""

    def __init__(self, store: Store, *, keep: bool) -> None:
        self._store = store
        self._keep = keep
        self.deleted: list[str] = []
        self.temporaries = 0

    @property
    def url(self) -> str:
        """See `Store.url`."""
        return self._store.url

    @property
    def guarantees(self) -> Guarantees:
        """See `Store.guarantees`."""
        return self._store.guarantees

    def get(self, key: str, max_nbytes: int) -> bytes:
        """See `Store.get`."""
        return self._store.get(key, max_nbytes)

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        """See `Store.get_range`."""
        self._store.get_range(key, offset, out)

    def has_length(self, key: str, nbytes: int) -> bool:
        """See `Store.has_length`."""
        return self._store.has_length(key, nbytes)

    def put(self, key: str, data: memoryview) -> None:
        """See `Store.put`."""
        self._store.put(key, data)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        """See `Store.put_if_absent`."""
        return self._store.put_if_absent(key, data)

    def list(self, prefix: str) -> list[str]:
        """See `Store.list`."""
        return self._store.list(prefix)

    def delete(self, *keys: str) -> None:
        """Note the keys, and remove the objects unless they are kept."""
        self.deleted += keys
        if not self._keep:
            self._store.delete(*keys)

    def clear_stale_temporaries(self) -> int:
        """Note how many, and remove them unless they are kept."""
        self.temporaries = 0 if self._keep else self._store.clear_stale_temporaries()
        return self.temporaries

    def close(self) -> None:
        """See `Store.close`."""
        self._store.close()
