//! Chooses which cells of a matrix are run. A cell is a list with the index of one value for each axis; index 0 is the
//! default.

use std::cmp::Reverse;
use std::collections::BTreeSet;

/// The set of cells to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Coverage {
    /// A small set in which every two values of different axes occur together.
    Pairs,
    /// The defaults, and each other value with the defaults of all other axes.
    Each,
    /// Every combination.
    All,
}

impl Coverage {
    /// Chooses among the possible cells of a matrix whose axes have `sizes` values. The first cell has the defaults. The
    /// same sizes always give the same cells.
    pub(super) fn cells(self, sizes: &[usize], possible: impl Fn(&[usize]) -> bool) -> Vec<Vec<usize>> {
        let mut all = all(sizes);
        all.retain(|cell| possible(cell));
        match self {
            // A single axis has no pairs, so each of its values makes a cell.
            Coverage::Pairs if sizes.len() > 1 => pairs(&all),
            Coverage::Pairs | Coverage::All => all,
            Coverage::Each => {
                all.retain(|cell| cell.iter().filter(|value| **value != 0).count() <= 1);
                all
            }
        }
    }

    /// Describes the set in a few words.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Coverage::Pairs => "every two values of different axes occur together",
            Coverage::Each => "the defaults, and each other value by itself",
            Coverage::All => "every combination",
        }
    }
}

fn all(sizes: &[usize]) -> Vec<Vec<usize>> {
    let grown = |cells: Vec<Vec<usize>>, size: &usize| {
        let longer = |cell: Vec<usize>| (0..*size).map(move |value| [&cell[..], &[value]].concat());
        cells.into_iter().flat_map(longer).collect()
    };
    sizes.iter().fold(vec![Vec::new()], grown)
}

/// Two values of different axes: the first axis and its value, the second axis and its value.
type Pair = (usize, usize, usize, usize);

fn pairs_in(cell: &[usize]) -> impl Iterator<Item = Pair> {
    let rest = move |(axis, value): (usize, &usize)| {
        let value = *value;
        cell.iter().enumerate().skip(axis + 1).map(move |(other, with)| (axis, value, other, *with))
    };
    cell.iter().enumerate().flat_map(rest)
}

/// Chooses cells until all pairs occur (a greedy pairwise cover): always the cell with the most missing pairs. Among
/// several such cells it takes the one that differs most from all chosen so far, which keeps the set small, and among
/// those the first.
fn pairs(all: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut missing: BTreeSet<Pair> = all.iter().flat_map(|cell| pairs_in(cell)).collect();
    let mut chosen: Vec<Vec<usize>> = Vec::new();
    while !missing.is_empty() {
        let gain = |cell: &&Vec<usize>| pairs_in(cell).filter(|pair| missing.contains(pair)).count();
        let alike = |one: &[usize], other: &[usize]| one.iter().zip(other).filter(|(a, b)| a == b).count();
        let likeness = |cell: &&Vec<usize>| chosen.iter().map(|known| alike(cell, known)).max();
        // At first all cells are equally good, and the one with the defaults comes first.
        let Some(best) = all.iter().min_by_key(|cell| (Reverse(gain(cell)), likeness(cell))) else { break };
        for pair in pairs_in(best) {
            missing.remove(&pair);
        }
        chosen.push(best.clone());
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cover_has_every_pair_and_begins_with_the_defaults() {
        for sizes in [vec![3, 3, 2, 3, 3, 2], vec![2, 2], vec![5, 1, 4], vec![2; 10], vec![4, 3, 2]] {
            let cells = Coverage::Pairs.cells(&sizes, |_| true);
            let has = |a: usize, x: usize, b: usize, y: usize| cells.iter().any(|c| c[a] == x && c[b] == y);
            for a in 0..sizes.len() {
                for b in a + 1..sizes.len() {
                    for (x, y) in (0..sizes[a]).flat_map(|x| (0..sizes[b]).map(move |y| (x, y))) {
                        assert!(has(a, x, b, y), "{sizes:?}: {x} of {a} with {y} of {b}");
                    }
                }
            }
            assert_eq!(cells[0], vec![0; sizes.len()]);
            assert_eq!(cells, Coverage::Pairs.cells(&sizes, |_| true), "the same each time");
            assert!(cells.len() <= all(&sizes).len());
        }
        assert!(Coverage::Pairs.cells(&[3, 3, 2, 3, 3, 2], |_| true).len() <= 12, "of 324");
        assert!(Coverage::Pairs.cells(&[2; 10], |_| true).len() <= 10, "of 1024");
    }

    #[test]
    fn what_is_impossible_does_not_occur_and_the_rest_of_the_pairs_does() {
        let possible = |cell: &[usize]| !(cell[0] == 2 && cell[1] == 2);
        let cells = Coverage::Pairs.cells(&[3, 3, 2], possible);
        assert!(cells.iter().all(|cell| possible(cell)));
        let seen: BTreeSet<Pair> = cells.iter().flat_map(|cell| pairs_in(cell)).collect();
        assert_eq!(seen.len(), 9 + 6 + 6 - 1);
        assert_eq!(Coverage::All.cells(&[3, 3, 2], possible).len(), 18 - 2);
    }

    #[test]
    fn one_axis_has_all_its_values_and_none_has_the_scenario_itself() {
        assert_eq!(Coverage::Pairs.cells(&[3], |_| true), [[0], [1], [2]]);
        assert_eq!(Coverage::Pairs.cells(&[], |_| true), [Vec::<usize>::new()]);
    }

    #[test]
    fn each_changes_one_axis_and_all_has_every_combination() {
        assert_eq!(Coverage::Each.cells(&[2, 3], |_| true), [[0, 0], [0, 1], [0, 2], [1, 0]]);
        assert_eq!(Coverage::All.cells(&[2, 2], |_| true), [[0, 0], [0, 1], [1, 0], [1, 1]]);
    }
}
