//! Tests of the whole cache: damage, runs at once, dead runs.

use std::io;
use std::os::unix::fs::MetadataExt;

use anyhow::bail;

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let cache = Cache::open_at(dir.path().join("vvu"), &Progress::new(true)).expect("opens");
    (dir, cache)
}

fn fill(dir: &Path) -> Result<()> {
    fs::create_dir(dir.join("sub"))?;
    fs::write(dir.join("sub/file"), "hello")?;
    std::os::unix::fs::symlink("sub/file", dir.join("link"))?;
    Ok(())
}

#[test]
fn key_depends_on_labels_and_borders() {
    let name = |parts: &[(&str, &str)]| {
        parts.iter().fold(Key::new(), |key, (label, bytes)| key.part(label, bytes)).name()
    };
    assert_eq!(name(&[("a", "b")]), name(&[("a", "b")]));
    assert_eq!(name(&[("a", "b")]), "cf6ab613e3942391f88ed698557e1680", "keys must not change by themselves");
    let keys =
        [name(&[("a", "bc")]), name(&[("ab", "c")]), name(&[("a", "b"), ("c", "")]), name(&[("a", "")])];
    for (at, key) in keys.iter().enumerate() {
        assert!(!keys[at + 1..].contains(key), "{keys:?}");
    }
}

#[test]
fn a_path_that_programs_cannot_be_given_is_refused_at_once() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let open = |name: &str| Cache::open_at(dir.path().join(name), &Progress::new(true)).map(drop);
    for name in ["a:b", "a\"b", "a\nb"] {
        let error = open(name).expect_err(name).to_string();
        assert!(error.contains("XDG_CACHE_HOME") && !dir.path().join(name).exists(), "{error}");
    }
    open("my j\u{fc}rgen's cache").expect("opens");
}

#[test]
fn the_cache_is_private() {
    let (_dir, cache) = cache();
    assert_eq!(fs::metadata(&cache.root).expect("made").mode() & 0o777, 0o700);
}

#[test]
fn an_entry_is_built_once() {
    let (_dir, cache) = cache();
    let key = Key::new().part("x", "1");
    let first = cache.entry("kind", &key, fill).expect("built");
    let again = cache.entry("kind", &key, |_| bail!("built twice")).expect("found");
    assert_eq!(first, again);
    assert_eq!(fs::read(first.path.join("link")).expect("there"), b"hello");
}

#[test]
fn damage_is_found_and_only_that_entry_is_rebuilt() {
    type Harm = fn(&Path) -> io::Result<()>;
    let harms: [(&str, Harm); 7] = [
        ("truncated", |files| File::options().write(true).open(files.join("sub/file"))?.set_len(2)),
        ("flipped", |files| fs::write(files.join("sub/file"), "hellp")),
        ("deleted", |files| fs::remove_file(files.join("sub/file"))),
        ("tree gone", |files| fs::remove_dir_all(files)),
        ("link", |files| fs::remove_file(files.join("link"))),
        ("no manifest", |files| fs::remove_file(files.join("../manifest.json"))),
        ("cut manifest", |files| fs::write(files.join("../manifest.json"), "{")),
    ];
    let (_dir, cache) = cache();
    let other = cache.entry("kind", &Key::new().part("x", "other"), fill).expect("built");
    for (name, harm) in harms {
        let key = Key::new().part("x", "1");
        let entry = cache.entry("kind", &key, fill).expect("built");
        harm(&entry.path).expect("harmed");
        let mut rebuilt = false;
        let entry = cache
            .entry("kind", &key, |dir| {
                rebuilt = true;
                fill(dir)
            })
            .expect("rebuilt");
        assert!(rebuilt, "{name} went unseen");
        assert_eq!(fs::read(entry.path.join("sub/file")).expect("there"), b"hello");
    }
    cache.entry("kind", &Key::new().part("x", "other"), |_| bail!("lost")).expect("untouched");
    assert!(other.path.exists());
}

#[test]
fn a_touched_file_with_the_same_content_is_fine() {
    let (_dir, cache) = cache();
    let key = Key::new().part("x", "1");
    let entry = cache.entry("kind", &key, fill).expect("built");
    fs::write(entry.path.join("sub/file"), "hello").expect("rewritten");
    cache.entry("kind", &key, |_| bail!("rebuilt for nothing")).expect("found");
}

#[test]
fn a_failed_build_leaves_nothing() {
    let (_dir, cache) = cache();
    let key = Key::new().part("x", "1");
    let result = cache.entry("kind", &key, |dir| {
        fill(dir)?;
        bail!("no luck")
    });
    assert_eq!(result.expect_err("failed").to_string(), "no luck");
    let left = list(&cache.root.join("kind")).expect("listed");
    assert!(left.iter().all(|path| path.extension() == Some(OsStr::new("lock"))), "{left:?}");
}

#[test]
fn discarded_trees_vanish() {
    let (_dir, cache) = cache();
    let tree = cache.dir("kind").expect("made").join("tree");
    for _ in 0..2 {
        make_dir(&tree.join("sub")).expect("made");
        let removed = cache.discard(&tree).expect("moved");
        assert!(!tree.exists());
        removed.recv().expect_err("nothing is sent");
    }
    let left = list(&cache.root.join("trash")).expect("listed");
    assert!(left.iter().all(|path| path.extension() == Some(OsStr::new("lock"))), "{left:?}");
}

#[test]
fn runs_at_once_build_once() {
    let (_dir, cache) = cache();
    let builds = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let entry = cache.entry("kind", &Key::new().part("x", "1"), |dir| {
                    builds.fetch_add(1, Ordering::Relaxed);
                    fill(dir)
                });
                assert!(entry.expect("one builds, the others find").path.join("sub/file").exists());
            });
        }
    });
    assert_eq!(builds.into_inner(), 1);
}

#[test]
fn what_dead_runs_left_is_swept_but_not_what_is_being_built() {
    let (_dir, cache) = cache();
    let (dead, alive) = (cache.root.join("kind/dead.tmp"), cache.root.join("kind/alive.tmp"));
    make_dir(&dead.join(FILES)).expect("made");
    make_dir(&alive.join(FILES)).expect("made");
    let lock = cache.lock("kind/alive").expect("locked");
    Cache::open_at(cache.root.clone(), &cache.progress).expect("opens");
    // The remover holds the lock until it is done.
    drop(cache.lock("kind/dead").expect("locked"));
    assert!(!dead.exists() && alive.exists());
    cache.clean().expect("cleaned");
    assert!(alive.exists());
    drop(lock);
    cache.clean().expect("cleaned");
    assert!(!alive.exists());
}

#[test]
fn entries_unused_for_long_are_swept_but_not_those_in_use() {
    let (_dir, cache) = cache();
    let entry = cache.entry("kind", &Key::new().part("x", "1"), fill).expect("built");
    let manifest = File::options().append(true).open(entry.path.join("../manifest.json")).expect("there");
    manifest.set_modified(SystemTime::now() - 2 * UNUSED_FOR).expect("aged");
    let root = cache.root.clone();
    let key = format!("kind/{}", Key::new().part("x", "1").name());
    for used in [true, false] {
        // The clock may have been put forward while a run uses the entry.
        let opened = Cache::open_at(root.clone(), &Progress::new(true)).expect("opens");
        // The remover holds the lock until it is done.
        drop(opened.lock(&key).expect("locked"));
        opened.clean().expect("cleaned");
        assert_eq!(entry.path.exists(), used);
        cache.uses.lock().expect("no panic").clear();
    }
}
