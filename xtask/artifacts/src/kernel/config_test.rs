use super::*;

const FRAGMENT: &str = "\
# What the guests need.
CONFIG_VFIO=y
CONFIG_VFIO_PCI=y
CONFIG_NEW=y
# optional: CONFIG_NEW
# CONFIG_MODULES is not set

# Speed. [preference]
CONFIG_HZ_100=y
CONFIG_NR_CPUS=8

CONFIG_PCI=y
";

fn requests() -> Requests {
    let mut requests = Requests::default();
    requests.add("test.config", FRAGMENT).expect("well formed");
    requests
}

#[test]
fn a_config_that_has_it_all_meets_it() {
    let all =
        "CONFIG_VFIO=y\nCONFIG_VFIO_PCI=y\nCONFIG_NEW=y\nCONFIG_HZ_100=y\nCONFIG_NR_CPUS=8\nCONFIG_PCI=y\n";
    assert_eq!(requests().unmet(&parse(all)), []);
    assert_eq!(requests().len(), 7);
}

#[test]
fn what_was_dropped_is_named_with_both_values() {
    let config =
        parse("CONFIG_VFIO=y\nCONFIG_VFIO_PCI=m\nCONFIG_MODULES=y\nCONFIG_NR_CPUS=64\nCONFIG_PCI=y\n");
    let unmet: Vec<String> = requests().unmet(&config).iter().map(ToString::to_string).collect();
    assert_eq!(
        unmet,
        [
            "CONFIG_HZ_100: want y, got n",
            "CONFIG_MODULES: want n, got y",
            "CONFIG_NEW: want y, got n",
            "CONFIG_NR_CPUS: want 8, got 64",
            "CONFIG_VFIO_PCI: want y, got m (one of the four options VVU's description names)",
        ]
    );
    let optional = requests().unmet(&config).into_iter().find(|unmet| unmet.optional);
    assert_eq!(optional.expect("one").symbol, "CONFIG_NEW");
}

#[test]
fn a_foreign_kernel_need_not_share_preferences() {
    let config = parse("CONFIG_VFIO=y\nCONFIG_MODULES=y\nCONFIG_HZ_250=y\n");
    let lacking: Vec<String> =
        requests().lacking(&config).into_iter().filter(|u| !u.optional).map(|u| u.symbol).collect();
    assert_eq!(lacking, ["CONFIG_PCI", "CONFIG_VFIO_PCI"]);
}

#[test]
fn later_fragments_win_and_text_round_trips() {
    let mut requests = requests();
    requests.add("more.config", "CONFIG_MODULES=y\n# CONFIG_PCI is not set\n").expect("well formed");
    let text = requests.text();
    assert!(text.contains("CONFIG_MODULES=y\n") && text.contains("# CONFIG_PCI is not set\n"), "{text}");
    let error = requests.add("bad.config", "\nCONFIG_X\n").expect_err("refused").to_string();
    assert!(error.contains("bad.config, line 2"), "{error}");
}

const KCONFIG: &str = "\
menu \"Outer\"
\tdepends on HAS_IOMEM

if VFIO
config VFIO_DEVICE_CDEV
\tbool \"cdev\" if EXPERT
\tdepends on IOMMUFD && \\
\t\t!X86_32
\thelp
\t  depends on nothing, says this text.

config VFIO_HIDDEN
\tbool
\tdefault y
endif
endmenu

config PLAIN
\tbool \"plain\"
";

#[test]
fn the_reason_shows_conditions_and_values() {
    let config = parse("CONFIG_VFIO=y\nCONFIG_HAS_IOMEM=y\nCONFIG_EXPERT=y\n");
    let text = explain(&find_declarations(KCONFIG, "VFIO_DEVICE_CDEV"), &config);
    assert!(text.contains("depends on IOMMUFD && !X86_32 [IOMMUFD=n, X86_32=n]"), "{text}");
    assert!(text.contains("depends on VFIO [VFIO=y]") && text.contains("HAS_IOMEM=y"), "{text}");
    let hidden = explain(&find_declarations(KCONFIG, "VFIO_HIDDEN"), &config);
    assert!(hidden.contains("cannot be set by hand"), "{hidden}");
    assert!(explain(&find_declarations(KCONFIG, "ABSENT"), &config).contains("no such option"));
    assert!(explain(&find_declarations(KCONFIG, "PLAIN"), &config).contains("choice"));
}
