"""A real S3 server that installs from a package: OpenStack Swift and its S3 interface, all in one
process. For tests.

``python tests/s3_server.py DIRECTORY`` stores objects below DIRECTORY and writes its port to
DIRECTORY/port once it serves.
"""

import eventlet

eventlet.monkey_patch()

import logging  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from eventlet import listen, spawn, wsgi  # noqa: E402
from swift.account.server import AccountController  # noqa: E402
from swift.common import utils  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.storage_policy import reload_storage_policies  # noqa: E402
from swift.common.wsgi import loadapp  # noqa: E402
from swift.container.server import ContainerController  # noqa: E402
from swift.obj.server import ObjectController  # noqa: E402

HOST, KEY, SECRET = "127.0.0.1", "test:tester", "testing"
CONFIG = f"""[DEFAULT]
swift_dir = {{directory}}
[pipeline:main]
pipeline = catch_errors listing_formats s3api tempauth bulk slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_{KEY.replace(":", "_")} = {SECRET} .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
"""


def main(directory: Path) -> None:
    (directory / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = test\n", encoding="utf-8")
    utils.SWIFT_CONF_FILE = str(directory / "swift.conf")  # else /etc/swift/swift.conf
    utils.validate_hash_conf()
    settings = {
        "devices": str(directory),
        "swift_dir": str(directory),
        "mount_check": "false",
        "fallocate_reserve": "0",
    }
    (directory / "disk").mkdir()
    logger = logging.getLogger("swift")
    storage = {"account": AccountController, "container": ContainerController, "object": ObjectController}
    for name, controller in storage.items():
        socket = listen((HOST, 0))
        ring = RingBuilder(part_power=1, replicas=1, min_part_hours=0)
        device = {
            "region": 1,
            "zone": 1,
            "ip": HOST,
            "port": socket.getsockname()[1],
            "device": "disk",
            "weight": 1,
        }
        ring.add_dev(device)
        ring.rebalance()
        ring.get_ring().save(str(directory / f"{name}.ring.gz"))
        if name == "object":
            reload_storage_policies()  # reads the new swift.conf
        spawn(wsgi.server, socket, controller(settings), logger)
    (directory / "proxy.conf").write_text(CONFIG.format(directory=directory), encoding="utf-8")
    socket = listen((HOST, 0))
    proxy = loadapp(str(directory / "proxy.conf"), global_conf={"log_name": "proxy"})
    (directory / "port.new").write_text(str(socket.getsockname()[1]), encoding="utf-8")
    (directory / "port.new").rename(directory / "port")
    wsgi.server(socket, proxy, logger)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
