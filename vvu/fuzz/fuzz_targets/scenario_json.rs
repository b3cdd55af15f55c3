//! Feeds the parsers of scenario files, of the current format and of the old one, arbitrary text.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = vvu_scenario::is_scenario(text);
    }
});
