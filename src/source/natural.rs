//! The order of names that hold numbers: `dense_2` before `dense_10`.

use std::cmp::Ordering;

/// Compares names part by part: runs of digits by the numbers that they are, all else by its
/// bytes.
pub(super) fn order(a: &str, b: &str) -> Ordering {
    let (mut rest_a, mut rest_b) = (a.as_bytes(), b.as_bytes());
    while let (Some(first_a), Some(first_b)) = (rest_a.first(), rest_b.first()) {
        let found = if first_a.is_ascii_digit() && first_b.is_ascii_digit() {
            let (number_a, number_b) = (take_number(&mut rest_a), take_number(&mut rest_b));
            // Without zeros in front the longer one is the greater one, however long.
            (number_a.len(), number_a).cmp(&(number_b.len(), number_b))
        } else {
            (rest_a, rest_b) = (&rest_a[1..], &rest_b[1..]);
            first_a.cmp(first_b)
        };
        if found != Ordering::Equal {
            return found;
        }
    }
    // What differs in zeros alone is still not the same.
    rest_a.len().cmp(&rest_b.len()).then_with(|| a.cmp(b))
}

/// Takes a run of digits off the front; what is left of it without zeros in front.
fn take_number<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let end = rest.iter().position(|byte| !byte.is_ascii_digit());
    let (digits, behind) = rest.split_at(end.unwrap_or(rest.len()));
    *rest = behind;
    let zeros = digits.iter().take_while(|&&digit| digit == b'0').count();
    &digits[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_count_as_numbers() {
        let sorted = [
            "",
            "0",
            "1",
            "2",
            "10",
            "18446744073709551616",
            "layers/dense/vars/0",
            "layers/dense/vars/1",
            "layers/dense_1/vars/0",
            "layers/dense_02/vars/0",
            "layers/dense_2/vars/0",
            "layers/dense_10/vars/0",
            "layers/dense_x/vars/0",
            "optimizer/vars/2",
            "optimizer/vars/10",
        ];
        for (i, a) in sorted.iter().enumerate() {
            for (j, b) in sorted.iter().enumerate() {
                assert_eq!(order(a, b), i.cmp(&j), "{a:?} {b:?}");
            }
        }
    }
}
