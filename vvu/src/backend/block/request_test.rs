use super::*;
use crate::backend::chain::Segment;
use vm_memory::{Address, Bytes, Permissions, VolatileSlice};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const TABLE: u64 = 0x1000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x6000;

fn memory() -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)]).expect("memory");
    let mut header = 8u32.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(0x1234u64.to_le_bytes());
    memory.write_slice(&header, GuestAddress(HEADER)).expect("header");
    memory
}

fn store(memory: &GuestMemoryMmap, table: u64, chain: &[(u64, u32, u16)]) {
    for (index, (addr, len, flags)) in (0u16..).zip(chain) {
        let at = GuestAddress(table + u64::from(index) * 16);
        memory.write_obj(*addr, at).expect("descriptor");
        memory.write_obj(*len, at.unchecked_add(8)).expect("descriptor");
        memory.write_obj(*flags, at.unchecked_add(12)).expect("descriptor");
        memory.write_obj(index + 1, at.unchecked_add(14)).expect("descriptor");
    }
}

/// Parses descriptors that are linked in their order as far as they say [`NEXT`].
fn parse(memory: &GuestMemoryMmap, chain: &[(u64, u32, u16)]) -> Result<Request, Rejected> {
    store(memory, TABLE, chain);
    Request::parse(memory, Chain::walk(memory, GuestAddress(TABLE), 16, 0))
}

fn reason(memory: &GuestMemoryMmap, chain: &[(u64, u32, u16)]) -> Malformed {
    parse(memory, chain).expect_err("malformed").reason
}

fn segments(list: &[(u64, u32)]) -> Segments {
    Segments(list.iter().map(|(addr, len)| Segment { addr: GuestAddress(*addr), len: *len }).collect())
}

#[test]
fn the_usual_layout() {
    let memory = memory();
    let request = parse(&memory, &[(HEADER, 16, NEXT), (DATA, 512, NEXT | WRITE), (STATUS, 1, WRITE)])
        .expect("request");
    assert_eq!((request.kind, request.sector), (8, 0x1234));
    assert_eq!(request.input, Segments::default());
    assert_eq!(request.output, segments(&[(DATA, 512)]));
    assert_eq!(request.status, GuestAddress(STATUS));
}

/// A driver may cut a request into descriptors as it likes (virtio 1.2, 2.7.4.3).
#[test]
fn any_layout() {
    let memory = memory();
    let request = parse(
        &memory,
        &[(HEADER, 5, NEXT), (HEADER + 5, 0, NEXT), (HEADER + 5, 11 + 100, NEXT), (DATA, 513, WRITE)],
    )
    .expect("request");
    assert_eq!((request.kind, request.sector), (8, 0x1234));
    assert_eq!(request.input, segments(&[(HEADER + 16, 100)]));
    assert_eq!(request.output, segments(&[(DATA, 512)]));
    assert_eq!(request.status, GuestAddress(DATA + 512));
}

#[test]
fn the_status_is_the_last_writable_byte_even_before_empty_descriptors() {
    let memory = memory();
    let request =
        parse(&memory, &[(HEADER, 16, NEXT), (STATUS, 1, NEXT | WRITE), (0, 0, WRITE)]).expect("request");
    assert_eq!((request.status, request.output.len()), (GuestAddress(STATUS), 0));
}

#[test]
fn an_indirect_table_holds_a_whole_request() {
    let memory = memory();
    store(&memory, 0x7000, &[(HEADER, 16, NEXT), (DATA, 512, NEXT | WRITE), (STATUS, 1, WRITE)]);
    let request = parse(&memory, &[(0x7000, 48, INDIRECT)]).expect("request");
    assert_eq!((request.output.len(), request.status), (512, GuestAddress(STATUS)));
}

#[test]
fn bad_indirect_tables_are_chains_without_end() {
    let memory = memory();
    store(&memory, 0x7000, &[(0x7000, 16, INDIRECT)]);
    for (name, table) in [
        ("nested", (0x7000, 16, INDIRECT)),
        ("half a descriptor", (0x7000, 24, INDIRECT)),
        ("empty", (0x7000, 0, INDIRECT)),
        ("outside of memory", (1 << 40, 16, INDIRECT)),
        ("at the end of the address space", (u64::MAX - 7, 32, INDIRECT)),
    ] {
        assert_eq!(reason(&memory, &[table]), ChainError::Endless.into(), "{name}");
        assert_eq!(
            reason(&memory, &[(HEADER, 16, NEXT), table]),
            ChainError::Endless.into(),
            "{name}, as second"
        );
    }
}

#[test]
fn a_loop_in_a_large_indirect_table_ends_early() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).expect("memory");
    store(&memory, 0x10_0000, &[(DATA, 1, NEXT)]);
    memory.write_obj(0u16, GuestAddress(0x10_000e)).expect("next");
    assert_eq!(reason(&memory, &[(0x10_0000, 65535 * 16, INDIRECT)]), ChainError::TooLong.into());
}

#[test]
fn malformed_requests_keep_their_status_where_there_is_one() {
    let memory = memory();
    type Case<'a> = (&'a str, &'a [(u64, u32, u16)], Malformed);
    let cases: [Case<'_>; 4] = [
        ("nothing readable", &[(STATUS, 1, WRITE)], Malformed::Header),
        ("short header", &[(HEADER, 15, NEXT), (STATUS, 1, WRITE)], Malformed::Header),
        ("order", &[(HEADER, 16, NEXT), (STATUS, 1, NEXT | WRITE), (DATA, 1, 0)], ChainError::Order.into()),
        ("header outside", &[(1 << 40, 16, NEXT), (STATUS, 1, WRITE)], ChainError::Memory(1 << 40).into()),
    ];
    for (name, chain, want) in cases {
        let rejected = parse(&memory, chain).expect_err("malformed");
        assert_eq!((rejected.reason, rejected.status), (want, Some(GuestAddress(STATUS))), "{name}");
    }
    let rejected = parse(&memory, &[(HEADER, 16, 0)]).expect_err("malformed");
    assert_eq!(rejected, Rejected { reason: Malformed::Status, status: None });
    let wrapping = [(HEADER, 16, NEXT), (u64::MAX, 2, WRITE)];
    assert_eq!(reason(&memory, &wrapping), Malformed::Status, "a status beyond the address space");
}

proptest::proptest! {
    /// Whatever the driver writes into its table, parsing ends and asks for memory in bounds only.
    #[test]
    fn any_table_parses_or_fails_but_never_panics(
        table in proptest::collection::vec((0u64..0xa000, 0u32..0x3000, 0u16..8), 1..16),
        huge in proptest::option::of((0usize..16, proptest::prelude::any::<(u64, u32)>())),
    ) {
        let mut table = table;
        if let Some((index, (addr, len))) = huge
            && let Some(entry) = table.get_mut(index)
        {
            (entry.0, entry.1) = (addr, len);
        }
        let memory = memory();
        if let Ok(request) = parse(&memory, &table) {
            if let Ok(slices) = request.output.slices(&memory, Permissions::Write) {
                let len: usize = slices.iter().map(VolatileSlice::len).sum();
                proptest::prop_assert_eq!(len as u64, request.output.len());
            }
            let _ = request.input.slices(&memory, Permissions::Read);
        }
    }
}
