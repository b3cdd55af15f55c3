//! The example of docs/library.md behind a vvu device.

use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vvu::ServeError;

use crate::chain::{FLAT, Proxy};
use crate::common::{Descriptor, Ring, SiblingMemory, WRITE};
use crate::program::Program;

#[path = "../../examples/entropy/device.rs"]
mod device;

const BEFORE: &str = include_str!("../../examples/entropy/vhost_user.rs");
const AFTER: &str = include_str!("../../examples/entropy/vvu.rs");

/// What `vvu::serve_vfio` does in the example, with a vfio-user client in place of VFIO.
fn start(proxy: &Proxy) -> Program<vhost_user_backend::Error> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let entropy = device::Entropy::open().expect("entropy");
    let mut daemon = VhostUserDaemon::new("entropy".to_owned(), entropy, memory).expect("daemon");
    Program::start(proxy, move |socket, _| daemon.serve(socket))
}

fn get_entropy(proxy: &Proxy, memory: &Arc<SiblingMemory>, wanted: u32) -> Vec<u8> {
    let mut frontend = Frontend::connect(proxy.vhost_user(), 1).expect("proxy");
    frontend.set_owner().expect("owner");
    let offered = frontend.get_features().expect("features");
    let protocol_features = frontend.get_protocol_features().expect("protocol features");
    frontend.set_protocol_features(protocol_features).expect("protocol features");
    frontend
        .set_features(offered & (1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()))
        .expect("set");
    frontend.set_mem_table(&memory.table()).expect("memory");
    let mut ring = Ring::new(memory, memory.base(), 64, false);
    frontend.set_vring_num(0, ring.size()).expect("size");
    frontend.set_vring_base(0, 0).expect("base");
    frontend.set_vring_addr(0, &ring.config(memory)).expect("addresses");
    frontend.set_vring_call(0, &ring.call).expect("call");
    frontend.set_vring_kick(0, &ring.kick).expect("kick");
    frontend.set_vring_enable(0, true).expect("enable");

    let addr = memory.base() + Ring::SPACE;
    let head = ring.allocate();
    ring.store(memory, head, Descriptor { addr, len: wanted, flags: WRITE, next: 0 });
    ring.push(memory, head);
    ring.kick();
    assert_eq!(ring.wait(memory), Ok((head, wanted)));
    memory.read(addr, usize::try_from(wanted).expect("length"))
}

#[test]
fn the_example_serves_entropy_and_ends_with_its_front_end() {
    let proxy = Proxy::start(8 << 20, 16);
    let memory = Arc::new(proxy.memory(&FLAT));
    let example = start(&proxy);
    let bytes = get_entropy(&proxy, &memory, 4096);
    let kinds: std::collections::BTreeSet<u8> = bytes.into_iter().collect();
    assert!(kinds.len() > 200, "{} of 256 values in 4096 bytes", kinds.len());
    example.outcome().expect("clean end");
    proxy.end();
}

#[test]
fn the_example_ends_when_the_device_is_gone() {
    let proxy = Proxy::start(8 << 20, 16);
    let example = start(&proxy);
    example.connection.shutdown(std::net::Shutdown::Both).expect("shutdown");
    assert!(matches!(example.outcome(), Err(ServeError::Bridge(_))));
    proxy.end();
}

#[test]
fn moving_to_vvu_changes_at_most_three_lines_and_the_document_shows_them() {
    // Read here, since a package of the crate does not have it.
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/library.md");
    let document = std::fs::read_to_string(path).expect("docs/library.md");
    let code = |text: &'static str| text.lines().filter(|line| !line.starts_with("//!"));
    assert_eq!(code(BEFORE).count(), code(AFTER).count());
    let changed: Vec<_> = code(BEFORE).zip(code(AFTER)).filter(|(before, after)| before != after).collect();
    assert!((1..=3).contains(&changed.len()), "{changed:?}");
    for (before, after) in changed {
        for line in [format!("-{before}\n"), format!("+{after}\n")] {
            assert!(document.contains(&line), "docs/library.md does not have {line:?}");
        }
    }
}
