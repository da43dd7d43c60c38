"""An S3 server on loopback, for tests and benchmarks: moto's, with counts, delays and failures in front of it.

`python tests/object_store.py FOLDER [--delay SECONDS]` serves a folder of token files until it is ended, for trials by
hand and for the benchmark, which needs the server in a process of its own.
"""

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

sys.path[0] = str(Path(__file__).resolve().parents[1]) if __name__ == "__main__" else sys.path[0]

BUCKET = "corpora"
AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=any/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class Store:
    """Serves S3 from the memory of this process. A context manager."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay  # seconds before each answer
        self.reads: Counter[tuple[str, str]] = Counter()  # GET requests by key and range
        self.broken: Callable[[str], bool] = lambda key: False  # these GET requests fail with 500

    def __enter__(self) -> "Store":
        from moto.moto_server.werkzeug_app import (
            DomainDispatcherApplication,
            MotoRequestHandler,
            create_backend_app,
        )
        from werkzeug.serving import make_server

        class Quiet(MotoRequestHandler):  # type: ignore[misc]
            def log(self, *arguments: Any) -> None:
                pass

        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.put("")
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(self.delay)
        if environ["REQUEST_METHOD"] == "GET":
            key = environ["PATH_INFO"].removeprefix(f"/{BUCKET}/")
            self.reads[key, environ.get("HTTP_RANGE", "")] += 1
            if self.broken(key):
                start_response("500 Internal Server Error", [("Content-Length", "0")])
                return []
        return self._moto(environ, start_response)  # type: ignore[no-any-return]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for the client, as a user sets them."""
        keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.address, **keys}

    def put(self, key: str, content: bytes = b"") -> None:
        headers = {"Content-Type": "application/octet-stream", "Authorization": AUTHORIZATION}
        request = Request(f"{self.address}/{BUCKET}/{key}".rstrip("/"), content, headers, method="PUT")
        urlopen(request, timeout=30).close()

    def upload(self, folder: Path, name: str = "mine") -> str:
        """Uploads a folder, and returns its URL."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    options = parser.parse_args()
    with Store() as store:
        print(store.upload(options.folder), *(f"{key}={value}" for key, value in store.environment.items()), flush=True)
        store.delay = options.delay
        sys.stdin.read()


if __name__ == "__main__":
    main()
