"""`multilora adopt`: declares that a data directory and a database belong together. Removes nothing."""

from __future__ import annotations

from server.cli.common.database_url import DatabaseUrlOption, database_url, remote_from_environment, shown
from server.cli.common.failures import CommandError
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, JsonOption, YesOption
from server.cli.common.output import Output
from server.cli.common.store_access import confirmed


def adopt(
    *,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    database_url_given: DatabaseUrlOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Join a data directory and a database that belong together, after a start failed with `wrong_store`.

    Needed after a restore of one of the two, or for a copy. The server must not run. Files that lie in the directory
    now are never removed as left-overs, because nothing proves where they belong. With MULTILORA_BLOB_URL the
    object store is joined too, and the directory, which must hold no adapters itself, becomes its cache.
    """
    output = Output(as_json=as_json)
    url = database_url(database_url_given)
    place = data_dir / "multilora.db" if url is None else shown(url)
    if not data_dir.is_dir():
        raise CommandError("data_dir_gone", f"{data_dir} is not a directory")
    confirmed(f"Do {data_dir} and {place} belong together?", yes=yes, output=output)
    from adapters_store.remote.bucket import Bucket
    from adapters_store.storage.database import adopt as join

    remote = remote_from_environment()
    store_id = join(data_dir, url, None if remote is None else Bucket.at(remote.url))
    output.emit(store_id=store_id, data_dir=str(data_dir))
    output.say(f"joined {data_dir} and {place} as store {store_id}")
