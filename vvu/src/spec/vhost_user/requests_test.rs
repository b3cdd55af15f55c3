use super::*;
use crate::spec::vhost_user::{BackendReq, FrontendReq};

const PAGE: &str = include_str!("../../../../docs/compatibility.md");
const BEGIN: &str = "<!-- begin: requests -->\n";
const END: &str = "<!-- end: requests -->";

#[test]
fn the_table_has_every_request_of_the_specification_once() {
    let codes: Vec<_> = FRONTEND_REQUESTS.iter().map(|row| row.code).collect();
    assert_eq!(codes, (1..=44).collect::<Vec<_>>());
    for row in &FRONTEND_REQUESTS {
        let known = FrontendReq::try_from(row.code).expect("a code of the vhost crate");
        assert_eq!(format!("{known:?}"), row.name);
        assert_eq!(Request::of_frontend(row.code), Some(row));
    }
    assert!(FrontendReq::try_from(45).is_err(), "the vhost crate knows more requests than the table");
    let codes: Vec<_> = BACKEND_REQUESTS.iter().map(|row| row.code).collect();
    assert_eq!(codes, (1..=10).collect::<Vec<_>>());
    for row in &BACKEND_REQUESTS {
        let known = BackendReq::try_from(row.code).expect("a code of the vhost crate");
        assert_eq!(format!("{known:?}"), row.name);
        assert_eq!(Request::of_backend(row.code), Some(row));
    }
    assert!(BackendReq::try_from(11).is_err(), "the vhost crate knows more requests than the table");
}

/// A device waits for the answer to exactly these; one too many or too few garbles the order of
/// answers on the front-end's socket.
#[test]
fn queries_are_the_requests_that_are_always_answered() {
    let queries: Vec<_> = FRONTEND_REQUESTS.iter().filter(|row| row.is_query()).map(|row| row.code).collect();
    assert_eq!(queries, [1, 11, 15, 17, 24, 26, 31, 36, 40]);
    assert!(!BACKEND_REQUESTS.iter().any(Request::is_query));
}

#[test]
fn what_needs_a_foreign_descriptor_is_not_carried() {
    for row in FRONTEND_REQUESTS.iter().chain(&BACKEND_REQUESTS) {
        assert!(!row.is_carried() || !matches!(row.fds, Fds::Foreign(_)), "{}", row.name);
    }
}

/// The tables in `docs/compatibility.md` are those of this file. If the test fails, paste the text
/// that it prints between the marks.
#[test]
fn the_page_shows_this_table() {
    let page = format!(
        "\n{}\nRequests of the back-end:\n\n{}\n",
        markdown(&FRONTEND_REQUESTS),
        markdown(&BACKEND_REQUESTS)
    );
    let (_, rest) = PAGE.split_once(BEGIN).expect("the beginning of the tables");
    let (shown, _) = rest.split_once(END).expect("the end of the tables");
    assert!(shown == page, "docs/compatibility.md is out of date; want between the marks:\n{page}");
}

fn markdown(requests: &[Request]) -> String {
    let mut text = String::from(
        "| code | request | payload | file descriptors | reply | a vvu device |\n|---|---|---|---|---|---|\n",
    );
    for row in requests {
        let reply = match (row.carried, row.reply) {
            (Carried::No(_), _) => String::new(),
            (Carried::Yes, Reply::Always(reply)) => payload(reply),
            (Carried::Yes, Reply::OnRequest) => "on request".to_owned(),
        };
        let does = match row.carried {
            Carried::No(why) => format!("refuses it: {why}"),
            Carried::Yes => format!("relays it{}", change(row)),
        };
        text.push_str(&format!(
            "| {} | `{}` | {} | {} | {reply} | {does} |\n",
            row.code,
            row.name,
            payload(row.payload),
            fds(row.fds)
        ));
    }
    text
}

fn payload(payload: Payload) -> String {
    match payload {
        Empty => "none".to_owned(),
        U64 => "u64".to_owned(),
        Features => "feature bits".to_owned(),
        ProtocolFeatures => "protocol feature bits".to_owned(),
        QueueCount => "number of queues".to_owned(),
        VringState => "queue, number".to_owned(),
        VringAddr => "queue, addresses".to_owned(),
        VringEventfd => "queue, no-fd bit".to_owned(),
        MemoryTable => "regions".to_owned(),
        SingleRegion => "one region".to_owned(),
        Inflight => "in-flight description".to_owned(),
        Config => "configuration bytes".to_owned(),
        Iotlb => "`vhost_iotlb_msg`".to_owned(),
        Other(name) => format!("`{name}`"),
    }
}

fn fds(fds: Fds) -> &'static str {
    match fds {
        Fds::None => "none",
        Fds::PerRegion => "a file per region",
        Fds::OfRegion => "the region's file",
        Fds::OfRegionOptional => "the region's file, or none",
        Fds::OfInflight => "the in-flight region's file",
        Fds::Kick => "kick eventfd",
        Fds::Call => "call eventfd",
        Fds::Err => "error eventfd",
        Fds::BackendChannel => "back-end channel",
        Fds::Foreign(what) => what,
    }
}

/// What the device changes in a request that it relays, or in the reply.
fn change(row: &Request) -> &'static str {
    match (row.fds, row.payload, row.reply_payload()) {
        (Fds::PerRegion | Fds::OfRegion, ..) => {
            "; the file must be the sibling memory file, which BAR 4 shows"
        }
        (Fds::OfInflight, ..) => "; the region must be the one in the sibling memory file",
        (Fds::Kick, ..) => "; the eventfd becomes an MSI-X vector",
        (Fds::Call | Fds::Err, ..) => "; the eventfd becomes a doorbell",
        (Fds::BackendChannel, ..) => "; requests of the back-end go through the transmit queue",
        (_, Features, _) | (_, _, Features) => "; clears `LOG_ALL`",
        (_, ProtocolFeatures, _) | (_, _, ProtocolFeatures) => "; clears the features that it cannot carry",
        (_, _, QueueCount) => "; the reply is at most the device's `--queues`",
        (_, _, Inflight) => "; puts the region of the reply into the sibling memory file",
        (_, VringState, VringState) => "; forgets the kick eventfd of the queue",
        _ => "",
    }
}
