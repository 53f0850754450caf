# Installs Outlast into DESTDIR, as a package or an operator would. Needs python3, make, a C compiler, and for
# the plugin Slurm's headers (slurm/spank.h).
PREFIX ?= /usr
DESTDIR ?=
PYTHON ?= python3
PYTHONDIR ?= $(PREFIX)/lib/python3/dist-packages
LIBEXECDIR ?= $(PREFIX)/libexec/outlast
SYSTEMDDIR ?= $(PREFIX)/lib/systemd
# Empty where whoever installs a package makes it, for the Python that is there.
BYTECODE ?= yes
PACKAGES = outlast criu_backend

MANDIR ?= $(PREFIX)/share/man

install: install-python install-native install-lib install-man install-completion install-slurm install-system

install-python:
	for package in $(PACKAGES); do \
		find $$package -name '*.py' -o -name py.typed -o -path '*/static/*' | while read -r file; do \
			install -D -m 644 "$$file" "$(DESTDIR)$(PYTHONDIR)/$$file" || exit 1; \
		done || exit 1; \
	done
	[ -z "$(BYTECODE)" ] || $(PYTHON) -m compileall -q -s "$(DESTDIR)" "$(DESTDIR)$(PYTHONDIR)/outlast" "$(DESTDIR)$(PYTHONDIR)/criu_backend"
	install -d "$(DESTDIR)$(PREFIX)/bin"
	printf '#!%s\nimport sys\n\nfrom outlast.cli import main\n\nsys.exit(main())\n' "$(PREFIX)/bin/python3 -P" \
		> "$(DESTDIR)$(PREFIX)/bin/outlast"
	chmod 755 "$(DESTDIR)$(PREFIX)/bin/outlast"
	install -D -m 755 outlast/shim.py "$(DESTDIR)$(LIBEXECDIR)/outlast-shim"
	install -D -m 755 outlast/set_back.py "$(DESTDIR)$(LIBEXECDIR)/outlast-set-back"

install-native:
	$(MAKE) -C criu_backend/native install DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)"

install-lib:
	$(MAKE) -C lib install DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)"

install-man:
	install -d "$(DESTDIR)$(MANDIR)"
	$(PYTHON) docs/man/make.py "$(DESTDIR)$(MANDIR)"

install-completion:
	install -d "$(DESTDIR)$(PREFIX)/share/bash-completion/completions" \
		"$(DESTDIR)$(PREFIX)/share/zsh/site-functions" "$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d"
	PYTHONPATH=. $(PYTHON) -m outlast.cli completion bash \
		> "$(DESTDIR)$(PREFIX)/share/bash-completion/completions/outlast"
	PYTHONPATH=. $(PYTHON) -m outlast.cli completion zsh \
		> "$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_outlast"
	PYTHONPATH=. $(PYTHON) -m outlast.cli completion fish \
		> "$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/outlast.fish"

install-slurm:
	$(MAKE) -C plugins/slurm install DESTDIR="$(DESTDIR)"
	for hook in prolog epilog epilog-slurmctld; do \
		install -D -m 755 hooks/slurm/$$hook "$(DESTDIR)$(LIBEXECDIR)/slurm/$$hook" || exit 1; \
	done

# Services, none of which is started by this; what becomes of logs.
install-system:
	for unit in watcher.service prune.service prune.timer metrics.service metrics.timer verify.service verify.timer; do \
		install -D -m 644 packaging/systemd/outlast-$$unit "$(DESTDIR)$(SYSTEMDDIR)/system/outlast-$$unit" || exit 1; \
	done
	install -D -m 644 packaging/systemd/outlast-launcher.service "$(DESTDIR)$(SYSTEMDDIR)/user/outlast-launcher.service"
	install -D -m 644 packaging/outlast.tmpfiles "$(DESTDIR)$(PREFIX)/lib/tmpfiles.d/outlast.conf"
	install -D -m 644 packaging/outlast.logrotate "$(DESTDIR)/etc/logrotate.d/outlast"

# The account for checkpoints, on a machine of its own that has nothing else of Outlast.
install-store:
	install -D -m 644 packaging/store/sysusers.conf "$(DESTDIR)$(PREFIX)/lib/sysusers.d/outlast-store.conf"
	install -D -m 644 packaging/store/tmpfiles.conf "$(DESTDIR)$(PREFIX)/lib/tmpfiles.d/outlast-store.conf"
	install -D -m 644 packaging/store/sshd.conf "$(DESTDIR)/etc/ssh/sshd_config.d/outlast.conf"

# Not a part of "install": a cluster has one scheduler. Afterwards scripts/install-pbs on the server.
install-pbs:
	install -D -m 755 hooks/pbs/action "$(DESTDIR)$(LIBEXECDIR)/pbs/action"
	install -D -m 644 plugins/pbs/outlast_hook.py "$(DESTDIR)$(LIBEXECDIR)/pbs/outlast_hook.py"
	install -D -m 644 plugins/pbs/outlast_hook.json "$(DESTDIR)$(LIBEXECDIR)/pbs/outlast_hook.json"
	install -D -m 755 scripts/install-pbs "$(DESTDIR)$(LIBEXECDIR)/pbs/install-pbs"
	install -D -m 644 packaging/systemd/pbs.conf "$(DESTDIR)$(SYSTEMDDIR)/system/outlast-watcher.service.d/pbs.conf"

.PHONY: install install-python install-native install-lib install-man install-completion install-slurm \
	install-system install-store install-pbs
