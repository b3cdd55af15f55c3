//! What front-end and back-end agree on through the chain.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ};
use vvu::bridge::Retry;
use vvu::spec::vhost_user::{CARRIED_PROTOCOL_FEATURES, FrontendReq};

use crate::chain::{Chain, FLAT, Guest, Proxy};
use crate::common::{DEADLINE, Driver, Setup, SiblingMemory, Task, config_u16, config_u64, pattern};

#[test]
fn features_and_configuration_arrive() {
    let chain = Chain::start(&FLAT, &pattern(1, 5 * 512));
    let mut driver = chain.connect(Setup { queues: 4, ..Setup::default() });
    for bit in [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, 32] {
        assert_ne!(driver.offered & 1 << bit, 0, "feature {bit}");
    }
    let want = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    assert_eq!(driver.protocol_features, want);
    assert_eq!(driver.frontend.get_queue_num().expect("queues"), 4);
    assert_eq!(config_u64(&driver.config, 0), 5, "capacity in sectors");
    assert_eq!(config_u16(&driver.config, 34), 4, "queues");
    chain.end();
}

/// A back-end that claims to be able to do everything.
fn boaster(listener: &UnixListener) -> std::io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut header = [0; 12];
    while stream.read_exact(&mut header).is_ok() {
        let [request, _, _, _, _, _, _, _, size, ..] = header;
        stream.read_exact(&mut vec![0; size.into()])?;
        if u32::from(request) != FrontendReq::SET_OWNER as u32 {
            let mut reply = vec![request, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0];
            reply.extend([0xff; 8]);
            stream.write_all(&reply)?;
        }
    }
    Ok(())
}

#[test]
fn features_that_need_what_cannot_be_carried_are_masked() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("boaster");
    let listener = UnixListener::bind(&path).expect("socket");
    let proxy = Proxy::start(1 << 20, 2);
    let boaster = Task::spawn("boaster", move || boaster(&listener));
    let guest = Guest::start(&proxy, &path, Retry::Forever);

    let stream = std::os::unix::net::UnixStream::connect(proxy.vhost_user()).expect("proxy");
    stream.set_read_timeout(Some(DEADLINE)).expect("timeout");
    let mut frontend = Frontend::from_stream(stream, 2);
    frontend.set_owner().expect("owner");
    let features = frontend.get_features().expect("features");
    assert_eq!(features, !VhostUserVirtioFeatures::LOG_ALL.bits());
    let protocol = frontend.get_protocol_features().expect("protocol features");
    assert_eq!(protocol, CARRIED_PROTOCOL_FEATURES);
    for uncarried in [VhostUserProtocolFeatures::LOG_SHMFD, VhostUserProtocolFeatures::PAGEFAULT] {
        assert!(!protocol.intersects(uncarried), "{uncarried:?}");
    }
    drop(frontend);
    guest.end();
    boaster.join().expect("boaster");
    proxy.end();
}

#[test]
fn an_acknowledgement_tells_yes_from_no() {
    let content = pattern(2, 4096);
    let chain = Chain::start(&FLAT, &content);
    let setup = Setup { acknowledged: true, ..Setup::default() };
    for size in [0, 4096] {
        let driver = chain.connect(setup);
        // The back-end says no to a queue size that it cannot have, and then hangs up.
        let refused = driver.frontend.set_vring_num(0, size).expect_err("refused");
        assert!(refused.to_string().contains("backend internal error"), "{refused}");
        driver.wait_disconnected();
    }
    let data = Driver::buffers(&chain.memory, 4);
    assert_eq!(chain.connect(setup).read(0, 0, data, 4096), content);
    chain.end();
}

#[test]
fn a_front_end_that_wants_no_acknowledgements_gets_none() {
    let content = pattern(3, 4096);
    let chain = Chain::start(&FLAT, &content);
    let mut driver = chain.connect(Setup { acknowledged: false, ..Setup::default() });
    let data = Driver::buffers(&chain.memory, 4);
    assert_eq!(driver.read(0, 0, data, 4096), content);
    // An answer that nobody asked for would be taken for the one to this.
    assert_eq!(driver.frontend.get_queue_num().expect("queues"), 4);
    chain.end();
}

#[test]
fn foreign_memory_is_refused_with_a_remedy_and_the_right_one_accepted_after() {
    let content = pattern(4, 4096);
    let chain = Chain::start(&FLAT, &content);
    let foreign = SiblingMemory::flat(8 << 20);
    let setup = Setup { acknowledged: true, ..Setup::default() };
    let mut driver = Driver::negotiate(&chain.proxy.vhost_user(), &chain.memory, setup).expect("negotiation");
    driver.frontend.set_mem_table(&foreign.table()).expect_err("foreign memory");
    let remedy = ["ERROR", "not in the sibling memory file", "memory-backend-file,id=mem,share=on,mem-path="];
    assert!(crate::logs::contain(&remedy));
    driver.frontend.set_mem_table(&chain.memory.table()).expect("the right memory");
    driver.start_queue(0).expect("queue");
    let data = Driver::buffers(&chain.memory, 4);
    assert_eq!(driver.read(0, 0, data, 4096), content);
    chain.end();
}

#[test]
fn foreign_memory_ends_a_connection_that_cannot_be_told() {
    let content = pattern(5, 4096);
    let chain = Chain::start(&FLAT, &content);
    let foreign = Arc::new(SiblingMemory::flat(8 << 20));
    let setup = Setup { acknowledged: false, ..Setup::default() };
    let driver = Driver::negotiate(&chain.proxy.vhost_user(), &foreign, setup).expect("negotiation");
    driver.frontend.set_mem_table(&foreign.table()).expect("sent");
    driver.wait_disconnected();
    assert!(crate::logs::contain(&["front-end disconnected", "start the sibling with"]));
    // The next one is welcome.
    let data = Driver::buffers(&chain.memory, 4);
    assert_eq!(chain.connect(Setup::default()).read(0, 0, data, 4096), content);
    chain.end();
}
