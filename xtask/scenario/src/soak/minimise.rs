//! Makes a course that fails as small as possible.

use anyhow::Result;

use super::course::Course;

/// Drops parts of `course`, which fails, for as long as what is left fails as well: `fails` tells of a course whether it
/// does, and `None` ends the search. Returns the smallest course that is known to fail.
///
/// # Errors
///
/// Fails when `fails` does.
pub(super) fn minimise(
    mut course: Course,
    mut fails: impl FnMut(&Course) -> Result<Option<bool>>,
) -> Result<Course> {
    'smaller: loop {
        for smaller in course.smaller() {
            match fails(&smaller)? {
                Some(true) => {
                    course = smaller;
                    continue 'smaller;
                }
                Some(false) => {}
                None => return Ok(course),
            }
        }
        return Ok(course);
    }
}
