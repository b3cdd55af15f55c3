//! Command lines for the shell, and the script that starts a run's VMs by hand.

use std::fmt::Write;

use crate::format::Step;
use vvu_testvm::facts::{command_line, quoted};

/// A process of a run and how to start it in a terminal.
#[derive(Debug, Clone)]
pub struct Part {
    /// `device`, `sibling`, or the vvu device's name for its proxy.
    pub name: String,
    /// Its program and arguments.
    pub words: Vec<String>,
    /// What was done in it, with all placeholders filled in.
    pub steps: Vec<String>,
}

/// A script that starts each part in a terminal of its own. `socket_dir` may be gone by then.
pub fn replay_script(run: &str, socket_dir: &str, parts: &[Part]) -> String {
    let mut usage =
        format!("Starts by hand what the run {run} started; each in a terminal of its own, in this order:\n");
    let mut cases = String::new();
    for Part { name, words, steps } in parts {
        let _ = writeln!(usage, "\n    $0 {name}");
        for step in steps {
            let _ = writeln!(usage, "        {step}");
        }
        let _ = writeln!(cases, "{})\n    exec {}\n    ;;", quoted(name), command_line(words));
    }
    let dir = quoted(socket_dir);
    format!(
        "#!/bin/sh\n# {run}: run without an argument for help.\nset -eu\n[ -d {dir} ] || mkdir -m 700 {dir}\n\
         case \"${{1:-}}\" in\n{cases}*)\n    sed \"s|\\$0|$0|\" <<'END'\n{usage}END\n    ;;\nesac\n"
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
