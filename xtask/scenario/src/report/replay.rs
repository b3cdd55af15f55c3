//! `replay.sh`: the script that starts the proxies and VMs of a run by hand.

use std::fmt::Write;

use crate::format::Step;
use vvu_testvm::facts::{command_line, quoted};

/// A process of a run, which the script starts in a terminal.
#[derive(Debug, Clone)]
pub struct Part {
    /// `device`, `sibling`, or the vvu device's name for its proxy.
    pub name: String,
    /// Program and arguments of the process.
    pub words: Vec<String>,
    /// The steps that were carried out in it, as text for people.
    pub steps: Vec<String>,
}

/// A script that starts each part in a terminal of its own and, without an argument, prints how. It makes `socket_dir`,
/// which the run may have removed.
pub fn replay_script(run: &str, socket_dir: &str, parts: &[Part]) -> String {
    let title =
        format!("Starts by hand what the run {run} started; each in a terminal of its own, in this order:");
    let mut usage = format!("    printf '%s\\n' {}\n", quoted(&title));
    let mut cases = String::new();
    for Part { name, words, steps } in parts {
        let name = quoted(name);
        let _ = writeln!(usage, "    printf '\\n    %s %s\\n' \"$0\" {name}");
        for step in steps {
            // The text of a scenario is data to the shell, whatever is in it.
            let step = quoted(&step.replace('\n', "\n        "));
            let _ = writeln!(usage, "    printf '        %s\\n' {step}");
        }
        let _ = writeln!(cases, "{name})\n    exec {}\n    ;;", command_line(words));
    }
    let dir = quoted(socket_dir);
    format!(
        "#!/bin/sh\n# Run it without an argument for help.\nset -eu\n[ -d {dir} ] || mkdir -m 700 {dir}\n\
         case \"${{1:-}}\" in\n{cases}*)\n{usage}    ;;\nesac\n"
    )
}

/// A step as a person does it by hand.
pub fn by_hand(step: &Step) -> String {
    match step {
        Step::Run(step) => format!("# {}", step.command),
        Step::Spawn(step) => format!("# {} &", step.command),
        Step::Console(step) => format!("(wait for the line /{}/)", step.line),
        Step::PowerOff(_) => "# poweroff".to_owned(),
        Step::Reboot(_) => "# reboot".to_owned(),
        step => format!("({step})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_text_of_a_scenario_is_printed_and_not_run() {
        let dir = tempfile::tempdir().expect("a directory");
        let evil =
            "# true\nEND\ntouch $PWD/ran\n`touch ran` $(touch ran) 'it''s' %s \\n\ncat <<'END'".to_owned();
        let part =
            Part { name: "device".to_owned(), words: vec!["true".to_owned()], steps: vec![evil.clone()] };
        let script = replay_script("run", &dir.path().display().to_string(), &[part]);
        let output = Command::new("sh").args(["-c", &script, "replay.sh"]).current_dir(dir.path()).output();
        let output = output.expect("sh starts");
        assert!(output.status.success(), "{output:?}");
        assert!(!dir.path().join("ran").exists(), "the scenario's text was run");
        let printed = String::from_utf8(output.stdout).expect("UTF-8");
        assert!(printed.contains(&evil.replace('\n', "\n        ")), "{printed}");
        assert!(printed.contains("\n    replay.sh device\n"), "{printed}");
    }
}
