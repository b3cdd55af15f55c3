//! The checks of all requirements. Each gives the evidence, the consequence and the remedy.

use vvu_artifacts::accel::Kind;
use vvu_artifacts::kernel;
use vvu_artifacts::machine::{Machine, X86_64};
use vvu_artifacts::packages::{Brings, Package};
use vvu_artifacts::qemu::{NEEDED_DEVICE, Origin, Qemu};
use vvu_testvm::memory::needed_mib;

use super::host::{Host, Place};
use super::requirement::{Requirement, Status};

/// RAM in MiB and number of the VMs of the scenario `block`.
const BLOCK: (u64, usize) = (1024, 2);
/// Room in the cache for the source and objects of a kernel and for everything else, in MiB.
const BUILD_ROOM_MIB: u64 = 3 << 10;
/// Room for the images and logs of a few runs and for what cargo builds, in MiB.
const RUN_ROOM_MIB: u64 = 1 << 10;
/// QEMU devices that scenarios use in addition to [`NEEDED_DEVICE`].
const DEVICES: [&str; 2] = ["virtio-iommu-pci", "vhost-user-blk-pci"];
/// Programs that fetch from Debian.
const APT: [&str; 2] = ["apt-get", "dpkg-deb"];

/// Checks all requirements, in the order in which a person sees to them.
pub(super) fn all(host: &Host) -> Vec<Requirement> {
    let mut all = vec![machine(host), rust(host), target(host), nextest(host)];
    all.extend(kernel::PACKAGES.iter().map(|package| self::package(host, package)));
    all.extend([libc_static(host), apt(host), qemu(host)]);
    all.extend([kernel(host), guest_tools(host), cache(host), cache_room(host), run_room(host)]);
    all.extend([accelerator(host), kvm_permission(host), memory(host), shared_memory(host), limits(host)]);
    all
}

fn machine(host: &Host) -> Requirement {
    match Machine::of(host.arch) {
        Ok(_) => Requirement::met("machine", host.arch),
        Err(error) => {
            let fix = format!("use a machine with {}", X86_64.title);
            Requirement::unmet("machine", Status::Missing, host.arch, error.to_string(), fix)
        }
    }
}

fn rust(host: &Host) -> Requirement {
    let want = env!("CARGO_PKG_RUST_VERSION");
    let consequence = "nothing can be built";
    let fix = format!("install Rust {want} or later with rustup");
    let Some(version) = host.answer("rustc", &["--version"]) else {
        return Requirement::unmet("rust", Status::Missing, "rustc does not run", consequence, fix);
    };
    let evidence = format!("{version}, want {want}");
    if parse_version(&version) >= parse_version(&format!("rustc {want}")) {
        Requirement::met("rust", evidence)
    } else {
        Requirement::unmet("rust", Status::Missing, evidence, consequence, fix)
    }
}

/// Major and minor version of `rustc 1.95.0 (...)`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_whitespace().nth(1)?.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The profile of the guests; on a host without one, that of the architecture that is supported.
fn profile(host: &Host) -> &'static Machine {
    Machine::of(host.arch).unwrap_or(&X86_64)
}

/// Rust's target triple for the guests' programs.
pub(super) fn target_triple(host: &Host) -> &'static str {
    profile(host).rust_target
}

/// Returns true if Rust has the standard library for [`target_triple`].
pub(super) fn has_target(host: &Host) -> bool {
    let dir = host.answer("rustc", &["--print", "target-libdir", "--target", target_triple(host)]);
    dir.is_some_and(|dir| std::path::Path::new(&dir).is_dir())
}

fn target(host: &Host) -> Requirement {
    let triple = target_triple(host);
    if has_target(host) {
        return Requirement::met("rust-target", triple);
    }
    let command = format!("rustup target add {triple}");
    let status = if host.program("rustup").is_some() { Status::Unfinished } else { Status::Missing };
    let consequence = "the programs of the guests cannot be built";
    Requirement::unmet(
        "rust-target",
        status,
        format!("no standard library for {triple}"),
        consequence,
        command,
    )
}

/// Returns true if `cargo nextest` runs.
pub(super) fn has_nextest(host: &Host) -> bool {
    host.answer("cargo-nextest", &["nextest", "--version"]).is_some()
}

fn nextest(host: &Host) -> Requirement {
    if let Some(version) = host.answer("cargo-nextest", &["nextest", "--version"]) {
        return Requirement::met("nextest", version.lines().next().unwrap_or_default());
    }
    Requirement::unmet(
        "nextest",
        Status::Worse,
        "cargo-nextest is not installed",
        "`cargo xtask test` cannot run; `cargo xtask e2e` can",
        "cargo install cargo-nextest --locked, or doctor --fix",
    )
}

fn package(host: &Host, package: &Package) -> Requirement {
    let id = format!("package-{}", package.name);
    let brings = match package.brings {
        Brings::Program(name) => name,
        Brings::File(path) => path,
    };
    if host.has(package.brings) {
        return Requirement::met(id, format!("{brings} is there"));
    }
    let (status, fix) = install(host, package.name);
    Requirement::unmet(id, status, format!("{brings} is not there"), "no kernel can be built", fix)
}

/// The status of a missing package, and the command that installs it.
fn install(host: &Host, name: &str) -> (Status, String) {
    let command = format!("apt-get install --no-install-recommends {name}");
    if host.installs {
        (Status::Unfinished, command)
    } else if host.program("apt-get").is_some() {
        (Status::Missing, format!("sudo {command}"))
    } else {
        let by_name = || format!("install the package that your distribution has for {name}");
        (Status::Missing, host.system.map_or_else(by_name, |system| system.install_command(&[name])))
    }
}

/// All programs of the guests except busybox are linked statically here.
fn libc_static(host: &Host) -> Requirement {
    let path = host.answer("cc", &["-print-file-name=libc.a"]);
    // A compiler that does not find the file prints its bare name.
    match path.filter(|path| path.contains('/') && std::path::Path::new(path).is_file()) {
        Some(path) => Requirement::met("libc-static", path),
        None => {
            let (status, fix) = install(host, "libc6-dev");
            let consequence = "the programs of the guests cannot be linked";
            Requirement::unmet("libc-static", status, "the C compiler finds no libc.a", consequence, fix)
        }
    }
}

fn apt(host: &Host) -> Requirement {
    let missing: Vec<_> = APT.into_iter().filter(|name| host.program(name).is_none()).collect();
    if missing.is_empty() {
        return Requirement::met("apt", APT.join(" and "));
    }
    Requirement::unmet(
        "apt",
        Status::Worse,
        format!("no {}", missing.join(", no ")),
        "QEMU, kernel source and missing packages cannot be fetched from Debian",
        match host.system {
            Some(system) => format!(
                "{}; then VVU_DEBIAN_MIRROR names a mirror. Or name your own QEMU and kernel with --qemu and --kernel",
                system.install_command(&["apt", "dpkg", "debian-archive-keyring"])
            ),
            None => "name your own QEMU and kernel with --qemu and --kernel".to_owned(),
        },
    )
}

/// The files of the undamaged cache entries of a kind.
fn cached<'a>(host: &'a Host, kind: &'a str) -> impl Iterator<Item = &'a std::path::Path> {
    let sound = host.cache.content.iter().filter(move |entry| entry.kind == kind && entry.damage.is_none());
    sound.map(|entry| entry.files.as_path())
}

/// The status of something that can be fetched from Debian; `fix` is for a machine without apt.
fn from_debian(host: &Host, fix: &str) -> (Status, String) {
    if APT.into_iter().all(|name| host.program(name).is_some()) {
        (
            Status::Unfinished,
            "the next run, or doctor --fix, gets it from this machine's Debian mirror".to_owned(),
        )
    } else {
        (Status::Missing, fix.to_owned())
    }
}

fn qemu(host: &Host) -> Requirement {
    let mut seen = Vec::new();
    let program = profile(host).qemu.program;
    let system = host.program(program).map(|path| Qemu::plain(path, Origin::System));
    let unpacked = cached(host, "qemu").map(Qemu::from_root);
    for qemu in system.into_iter().chain(unpacked) {
        match qemu {
            Err(error) => seen.push(format!("{error:#}")),
            Ok(qemu) => {
                let missing: Vec<_> = [NEEDED_DEVICE]
                    .into_iter()
                    .chain(DEVICES)
                    .filter(|device| !qemu.probe_device(device))
                    .collect();
                let origin =
                    if qemu.origin == Origin::System { "the system's" } else { "unpacked into the cache" };
                if missing.is_empty() {
                    let devices = DEVICES.join(", ");
                    return Requirement::met(
                        "qemu",
                        format!("QEMU {}, {origin}, has {NEEDED_DEVICE}, {devices}", qemu.version),
                    );
                }
                seen.push(format!("QEMU {}, {origin}, has no {}", qemu.version, missing.join(", no ")));
            }
        }
    }
    if seen.is_empty() {
        seen.push(format!("no {program}, and none in the cache"));
    }
    let (status, fix) = from_debian(host, "install QEMU 10.1 or later, or name one with --qemu");
    Requirement::unmet("qemu", status, seen.join("; "), "no VM can start", fix)
}

fn kernel(host: &Host) -> Requirement {
    match cached(host, "kernel").count() {
        0 => {
            let (status, fix) =
                from_debian(host, "name one with --kernel, or its source with --kernel-source");
            Requirement::unmet(
                "kernel",
                status,
                "no kernel has been built",
                "the first run takes some minutes longer",
                fix,
            )
        }
        count => Requirement::met("kernel", format!("{count} in the cache")),
    }
}

fn guest_tools(host: &Host) -> Requirement {
    if cached(host, "guest-tools").next().is_some() {
        return Requirement::met("guest-tools", "busybox and lspci are in the cache");
    }
    let (status, fix) = from_debian(host, "run a scenario on a machine with apt and copy its cache");
    Requirement::unmet("guest-tools", status, "not in the cache", "no initramfs can be made", fix)
}

fn cache(host: &Host) -> Requirement {
    let Place { path, writable, content, .. } = &host.cache;
    if !writable {
        return Requirement::unmet(
            "cache",
            Status::Missing,
            format!("{} cannot be written", path.display()),
            "nothing can be kept",
            "set XDG_CACHE_HOME to a directory that can be written",
        );
    }
    let damaged: Vec<String> = content
        .iter()
        .filter_map(|entry| entry.damage.as_ref().map(|damage| format!("{}: {damage}", entry.kind)))
        .collect();
    if damaged.is_empty() {
        let state = if content.is_empty() {
            "empty".to_owned()
        } else {
            format!("{} entries, verified", content.len())
        };
        return Requirement::met("cache", format!("{}: {state}", path.display()));
    }
    Requirement::unmet(
        "cache",
        Status::Unfinished,
        format!("{}: damaged: {}", path.display(), damaged.join("; ")),
        "damaged entries are not used",
        "the next run, or doctor --fix, makes them again; `cargo xtask clean` removes everything",
    )
}

fn cache_room(host: &Host) -> Requirement {
    let want = if cached(host, "kernel").next().is_some() { RUN_ROOM_MIB } else { BUILD_ROOM_MIB };
    let fix = "free some space, or set XDG_CACHE_HOME to a directory with more";
    room("cache-room", &host.cache, want, "kernel and QEMU do not fit", fix)
}

fn run_room(host: &Host) -> Requirement {
    let fix = "free some space, or set CARGO_TARGET_DIR to a directory with more; `cargo xtask clean` removes old runs";
    room("run-room", &host.runs, RUN_ROOM_MIB, "the images and logs of a run do not fit", fix)
}

fn room<T>(id: &str, place: &Place<T>, want_mib: u64, consequence: &str, fix: &str) -> Requirement {
    let evidence = format!("{} MiB free for {}, want {want_mib} MiB", place.free_mib, place.path.display());
    if !place.writable {
        let evidence = format!("{} cannot be written", place.path.display());
        Requirement::unmet(id, Status::Missing, evidence, consequence, fix)
    } else if place.free_mib < want_mib {
        Requirement::unmet(id, Status::Missing, evidence, consequence, fix)
    } else {
        Requirement::met(id, evidence)
    }
}

fn accelerator(host: &Host) -> Requirement {
    let consequence = "the VMs are emulated (TCG): every scenario works, but several times slower";
    match &host.accelerator {
        Ok(chosen) if chosen.kind == Kind::Kvm => {
            Requirement::met("accelerator", format!("kvm: {}", chosen.reason))
        }
        Ok(chosen) => Requirement::unmet(
            "accelerator",
            Status::Worse,
            format!("tcg: {}", chosen.reason),
            consequence,
            "use a machine with KVM in hardware; `e2e --nested` tests the KVM path on this one",
        ),
        Err(error) => Requirement::unmet("accelerator", Status::Worse, format!("{error:#}"), consequence, ""),
    }
}

fn kvm_permission(host: &Host) -> Requirement {
    match host.kvm_opens {
        None => Requirement::met("kvm-permission", "there is no /dev/kvm"),
        Some(true) => Requirement::met("kvm-permission", "/dev/kvm can be opened"),
        Some(false) => Requirement::unmet(
            "kvm-permission",
            Status::Worse,
            "no permission to open /dev/kvm",
            "KVM cannot be used",
            "sudo usermod -aG kvm $USER, then log in again",
        ),
    }
}

fn memory(host: &Host) -> Requirement {
    let want = needed_mib(BLOCK.0, BLOCK.1);
    match &host.free_mib {
        Ok(free) if *free >= want => Requirement::met("memory", format!("{free} MiB free, want {want} MiB")),
        Ok(free) => Requirement::unmet(
            "memory",
            Status::Missing,
            format!("{free} MiB free, want {want} MiB"),
            "the scenario block does not start",
            "end other programs, or run a scenario of your own with a lower memory_mib",
        ),
        Err(error) => Requirement::unmet(
            "memory",
            Status::Missing,
            format!("{error:#}"),
            "no scenario starts",
            "mount /proc",
        ),
    }
}

fn shared_memory(host: &Host) -> Requirement {
    match &host.memfd {
        Ok(()) => Requirement::met("shared-memory", "memfd of 1 GiB; /dev/shm is not used"),
        Err(error) => Requirement::unmet(
            "shared-memory",
            Status::Missing,
            format!("memfd_create: {error:#}"),
            "the VMs cannot share memory",
            "allow memfd_create in the sandbox or container",
        ),
    }
}

fn limits(host: &Host) -> Requirement {
    if host.low_limits.is_empty() {
        return Requirement::met(
            "limits",
            "files, file size, address space and processes suffice; the host locks no memory",
        );
    }
    Requirement::unmet(
        "limits",
        Status::Missing,
        host.low_limits.join("; "),
        "VMs may not start",
        "raise them with ulimit, or in /etc/security/limits.conf",
    )
}
