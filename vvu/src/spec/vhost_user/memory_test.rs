use super::*;
use crate::spec::vhost_user::{Header, parse_u64};
use proptest::collection::vec;
use proptest::prelude::*;

fn region(gpa: u64, size: u64, va: u64, offset: u64) -> MemoryRegion {
    MemoryRegion { gpa: SiblingGpa(gpa), size, va: SiblingVa(va), offset: BarOffset(offset) }
}

#[test]
fn golden_memory_table() {
    #[rustfmt::skip]
    let bytes = [
        2, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0x80, 0, 0, 0, 0,  0, 0, 0, 0, 0x7f, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 1, 0, 0, 0,  0, 0, 0, 0x40, 0, 0, 0, 0,  0, 0, 0, 0x80, 0x7f, 0, 0, 0,  0, 0, 0, 0x80, 0, 0, 0, 0,
    ];
    let want = [
        region(0, 0x8000_0000, 0x7f_0000_0000, 0),
        region(0x1_0000_0000, 0x4000_0000, 0x7f_8000_0000, 0x8000_0000),
    ];
    assert_eq!(parse_memory_table(&bytes).expect("table"), want);
    assert_eq!(memory_table_to_bytes(&want), bytes);
}

#[test]
fn tables_that_lie_are_refused() {
    let refuse =
        |regions: &[MemoryRegion]| parse_memory_table(&memory_table_to_bytes(regions)).expect_err("lie");
    assert_eq!(refuse(&[]), MessageError::RegionCount { got: 0 });
    let many: Vec<_> = (0..33).map(|i| region(i << 12, 4096, i << 12, i << 12)).collect();
    assert_eq!(refuse(&many), MessageError::RegionCount { got: 33 });
    for bad in [
        region(0, 0, 0, 0),
        region(1, 4096, 0, 0),
        region(0, 4095, 0, 0),
        region(0, 4096, 0, 7),
        region(0u64.wrapping_sub(4096), 8192, 0, 0),
        region(0, 8192, u64::MAX - 4096, 0),
        region(0, 8192, 0, 0u64.wrapping_sub(4096)),
    ] {
        assert!(matches!(refuse(&[bad]), MessageError::RegionShape { index: 0, .. }), "{bad:?}");
    }
    let overlap = refuse(&[region(0, 8192, 0, 0), region(4096, 8192, 1 << 20, 8192)]);
    assert_eq!(overlap, MessageError::RegionOverlap { first: 0, second: 1 });
    let mut short = memory_table_to_bytes(&[region(0, 4096, 0, 0)]);
    short.pop();
    assert!(matches!(parse_memory_table(&short), Err(MessageError::PayloadSize { .. })));
}

#[test]
fn golden_inflight_description() {
    let mut bytes = [0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0];
    let area = InflightArea::parse(32, &bytes).expect("area");
    assert_eq!(area, InflightArea { size: 0x1000, offset: BarOffset(0x2000_0000) });
    InflightArea { size: 0x1000, offset: BarOffset(1) }.write(&mut bytes);
    assert_eq!(bytes[8..], [1, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0]);
    assert!(InflightArea::parse(32, &bytes[..20]).is_err());
}

/// All tables of two regions whose fields are at the edges, against a rule in arithmetic that cannot wrap.
#[test]
fn a_table_is_accepted_if_and_only_if_its_regions_are_sound_and_apart() {
    const P: u64 = PAGE_SIZE;
    const TOP: u64 = u64::MAX - P + 1;
    let mut regions = Vec::new();
    for gpa in [0, P, 2 * P, P + 1, TOP] {
        for size in [0, 1, P, 2 * P, TOP] {
            for va in [0, 1, P, 2 * P, TOP - 1, TOP] {
                regions.extend([0, P, 1, TOP].map(|offset| region(gpa, size, va, offset)));
            }
        }
    }
    let is_sound = |region: &MemoryRegion| {
        let starts = [region.gpa.0, region.va.0, region.offset.0];
        let whole = [region.size, region.gpa.0, region.offset.0].iter().all(|value| value % P == 0);
        let ends = starts.map(|start| u128::from(start) + u128::from(region.size));
        region.size > 0 && whole && ends.iter().all(|end| *end < 1 << 64)
    };
    let are_apart = |a: &MemoryRegion, b: &MemoryRegion| {
        let apart = |(a, a_size): (u64, u64), (b, b_size): (u64, u64)| {
            u128::from(a) + u128::from(a_size) <= u128::from(b)
                || u128::from(b) + u128::from(b_size) <= u128::from(a)
        };
        apart((a.gpa.0, a.size), (b.gpa.0, b.size)) && apart((a.va.0, a.size), (b.va.0, b.size))
    };
    let mut accepted = 0;
    for first in &regions {
        // One bad region spoils every table: a few second ones show that.
        let seconds = if is_sound(first) { &regions[..] } else { &regions[..100] };
        for second in seconds {
            let table = [*first, *second];
            let want = is_sound(first) && is_sound(second) && are_apart(first, second);
            let got = parse_memory_table(&memory_table_to_bytes(&table));
            assert_eq!(got.is_ok(), want, "{table:x?}: {got:?}");
            accepted += u32::from(want);
        }
    }
    assert!(accepted > 100, "{accepted}");
}

proptest! {
    #[test]
    fn any_bytes_parse_or_fail_but_never_panic(bytes in vec(any::<u8>(), 0..1200)) {
        let _ = Header::parse(&bytes);
        let _ = parse_memory_table(&bytes);
        let _ = parse_single_region(37, &bytes);
        let _ = parse_u64(1, &bytes);
        let _ = InflightArea::parse(31, &bytes);
    }

    #[test]
    fn tables_round_trip(sizes in vec((1..1u64 << 20, 0..1u64 << 20), 1..=32)) {
        let mut at = 0;
        let regions: Vec<_> = sizes.iter().map(|(pages, gap)| {
            let region = region(at, pages << 12, at + (1 << 46), at);
            at += (pages + gap) << 12;
            region
        }).collect();
        prop_assert_eq!(parse_memory_table(&memory_table_to_bytes(&regions)), Ok(regions));
    }
}
