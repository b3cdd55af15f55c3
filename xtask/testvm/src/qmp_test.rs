use super::*;

/// A QEMU that reads a line for each of `lines` and then sends it.
fn qemu(lines: &'static [&'static str]) -> (Qmp, tempfile::TempDir, thread::JoinHandle<Vec<String>>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("qmp");
    let qmp = Qmp::listen(&path).expect("a socket");
    let stream = UnixStream::connect(&path).expect("connected");
    let thread = thread::spawn(move || {
        let mut writer = stream.try_clone().expect("a clone");
        writer.write_all(b"{\"QMP\": {\"version\": {}}}\r\n").expect("written");
        let mut reader = BufReader::new(stream);
        let mut read = Vec::new();
        for line in lines {
            let mut asked = String::new();
            if reader.read_line(&mut asked).expect("readable") == 0 {
                break;
            }
            read.push(asked.trim_end().to_owned());
            writer.write_all(line.as_bytes()).and_then(|()| writer.write_all(b"\r\n")).expect("written");
        }
        read
    });
    (qmp, dir, thread)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

const READY: &str = r#"{"return": {}, "id": 1}"#;

#[test]
fn a_command_is_answered_by_its_number_among_events() {
    let (mut qmp, dir, qemu) = qemu(&[
        READY,
        "{\"event\": \"RESUME\", \"data\": {}}\n{\"return\": {\"running\": true}, \"id\": 2}",
        r#"{"error": {"class": "GenericError", "desc": "no such thing"}, "id": 3}"#,
    ]);
    let reply = qmp.execute("query-status", &json!({}), soon(), || Ok(())).expect("answered");
    assert_eq!(reply, Reply::Return(json!({"running": true})));
    let reply = qmp.execute("object-del", &json!({"id": "x"}), soon(), || Ok(())).expect("answered");
    assert_eq!(reply, Reply::Error("no such thing".to_owned()));
    let asked = qemu.join().expect("no panic");
    assert!(asked[0].contains(r#""execute":"qmp_capabilities""#), "{asked:?}");
    assert_eq!(asked[2], r#"{"arguments":{"id":"x"},"execute":"object-del","id":3}"#);
    drop(qmp);
    assert!(!dir.path().join("qmp").exists());
}

#[test]
fn an_exchange_waits_for_the_event_of_its_device() {
    let (mut qmp, _dir, qemu) = qemu(&[
        READY,
        "{\"return\": \"\", \"id\": 2}",
        "{\"event\": \"DEVICE_DELETED\", \"data\": {\"path\": \"/p\"}}\n{\"return\": {}, \"id\": 3}\n\
         {\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"other\"}}\n\
         {\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"d\", \"path\": \"/d\"}}",
    ]);
    let exchanges = [
        Exchange::Words("device_add x".to_owned()),
        Exchange::Command { execute: "device_del", arguments: json!({"id": "d"}) },
        Exchange::Event { name: "DEVICE_DELETED", data: json!({"device": "d"}) },
    ];
    qmp.carry_out(&exchanges, soon(), || Ok(())).expect("all went well");
    assert_eq!(qemu.join().expect("no panic").len(), 3);
}

#[test]
fn what_the_vmm_or_the_guest_refuses_fails_with_its_words() {
    let (mut qmp, _dir, _qemu) = qemu(&[
        READY,
        r#"{"return": "Error: Bus 'pcie.0' does not support hotplugging\r\n", "id": 2}"#,
        r#"{"error": {"class": "DeviceNotFound", "desc": "Device 'd' not found"}, "id": 3}"#,
        "{\"return\": {}, \"id\": 4}\n{\"event\": \"DEVICE_UNPLUG_GUEST_ERROR\", \"data\": {\"device\": \"d\"}}",
    ]);
    let mut refused = |exchanges: &[Exchange]| {
        format!("{:#}", qmp.carry_out(exchanges, soon(), || Ok(())).expect_err("refused"))
    };
    let words = refused(&[Exchange::Words("device_add x".to_owned())]);
    assert!(words.ends_with("`device_add x`: Error: Bus 'pcie.0' does not support hotplugging"), "{words}");
    let delete = Exchange::Command { execute: "device_del", arguments: json!({"id": "d"}) };
    let command = refused(std::slice::from_ref(&delete));
    assert!(command.ends_with("refused device_del: Device 'd' not found"), "{command}");
    let deleted = Exchange::Event { name: "DEVICE_DELETED", data: json!({"device": "d"}) };
    let event = refused(&[delete, deleted]);
    assert!(event.contains("the guest refused: ") && event.contains("DEVICE_UNPLUG_GUEST_ERROR"), "{event}");
}

#[test]
fn a_wait_ends_with_the_deadline_the_check_and_the_connection() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("qmp");
    let mut qmp = Qmp::listen(&path).expect("a socket");
    let late = qmp.execute("stop", &json!({}), Instant::now(), || Ok(())).expect_err("late").to_string();
    assert!(late.contains("did not open its management connection"), "{late}");
    let gone = qmp.execute("stop", &json!({}), soon(), || bail!("QEMU ended")).expect_err("gone").to_string();
    assert_eq!(gone, "QEMU ended");
    drop(UnixStream::connect(&path).expect("connected"));
    let ended = qmp.execute("stop", &json!({}), soon(), || Ok(())).expect_err("ended");
    let ended = format!("{ended:#}");
    assert!(ended.contains("management connection"), "{ended}");
}

#[test]
fn a_line_that_is_no_message_ends_the_connection() {
    let (mut qmp, _dir, _qemu) = qemu(&["nonsense"]);
    let error = qmp.execute("stop", &json!({}), soon(), || Ok(())).expect_err("nonsense");
    assert!(format!("{error:#}").contains("not a message of QMP"), "{error:#}");
}
