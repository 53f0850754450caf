#!/bin/bash
# build.sh deb|rpm|wheel SOURCE OUT [VERSION]: builds the packages of the product in SOURCE, which it changes, and
# puts them into OUT; as VERSION, if that is given. Runs in the root file system for building.
set -euo pipefail

kind=$1 source=$2 out=$3 version=${4:-}
cd "$source"
export HOME=/tmp DEB_BUILD_OPTIONS='nocheck noautodbgsym parallel=2'
[ -z "$version" ] || sed -i "s/^__version__ = .*/__version__ = \"$version\"/" outlast/__init__.py

case $kind in
deb)
	cp -r packaging/debian debian
	[ -z "$version" ] || sed -i "1s/(.*)/($version)/" debian/changelog
	dpkg-buildpackage -b -us -uc
	cp ../*.deb ../*.changes "$out"
	;;
rpm)
	[ -z "$version" ] || sed -i "s/^Version:.*/Version: $version/" packaging/outlast.spec
	# What it needs to build is here as Debian's packages, of which rpm does not know.
	rpmbuild --nodeps --quiet -bb --build-in-place --define "_topdir /tmp/rpm" --define "_rpmdir $out" packaging/outlast.spec
	;;
wheel)
	python3 -m build --no-isolation --wheel --outdir "$out" .
	;;
esac
