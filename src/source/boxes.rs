//! Boxes of elements: how a run of a tensor falls apart into them, and how their
//! elements come from where they lie.

/// Cuts the elements `first..end` of a tensor in C order into at most two boxes for each
/// dimension, in their order. `each` gets the first index and the lengths.
pub(super) fn cut<E>(
    shape: &[u64],
    first: u64,
    end: u64,
    each: &mut impl FnMut(&[u64], &[u64]) -> Result<(), E>,
) -> Result<(), E> {
    let mut start = vec![0; shape.len()];
    let mut lens = vec![1; shape.len()];
    cut_at(shape, 0, (first, end), (&mut start, &mut lens), each)
}

fn cut_at<E>(
    shape: &[u64],
    depth: usize,
    (first, end): (u64, u64),
    (start, lens): (&mut [u64], &mut [u64]),
    each: &mut impl FnMut(&[u64], &[u64]) -> Result<(), E>,
) -> Result<(), E> {
    if first >= end {
        return Ok(());
    }
    let Some(rest) = shape.get(depth + 1..) else {
        return each(start, lens);
    };
    // Elements of one index here.
    let step: u64 = rest.iter().product::<u64>().max(1);
    let (mut index, last) = (first / step, end / step);
    let mut part = |index, count, run: Option<(u64, u64)>| {
        start[depth] = index;
        lens[depth] = count;
        start[depth + 1..].fill(0);
        match run {
            Some(run) => {
                lens[depth + 1..].fill(1);
                cut_at(shape, depth + 1, run, (start, lens), each)
            }
            None => {
                lens[depth + 1..].copy_from_slice(rest);
                each(start, lens)
            }
        }
    };
    if !first.is_multiple_of(step) {
        let run_end = if index == last { end % step } else { step };
        part(index, 1, Some((first % step, run_end)))?;
        index += 1;
    }
    if index < last {
        part(index, last - index, None)?;
    }
    if index <= last && !end.is_multiple_of(step) {
        part(last, 1, Some((0, end % step)))?;
    }
    Ok(())
}

/// The part that two boxes have in common: first index and lengths.
pub(super) fn common(
    (a_start, a_lens): (&[u64], &[u64]),
    (b_start, b_lens): (&[u64], &[u64]),
) -> Option<(Vec<u64>, Vec<u64>)> {
    let mut start = Vec::with_capacity(a_start.len());
    let mut lens = Vec::with_capacity(a_start.len());
    for (((&a, &a_len), &b), &b_len) in a_start.iter().zip(a_lens).zip(b_start).zip(b_lens) {
        let from = a.max(b);
        let to = a.saturating_add(a_len).min(b.saturating_add(b_len));
        if from >= to {
            return None;
        }
        start.push(from);
        lens.push(to - from);
    }
    Some((start, lens))
}

/// Steps between neighbours in C order, in units of `item`. `None` where they overflow.
pub(super) fn steps(shape: &[u64], item: u64) -> Option<Vec<u64>> {
    let mut steps = vec![0; shape.len()];
    let mut step = item;
    for (slot, &len) in steps.iter_mut().zip(shape).rev() {
        *slot = step;
        step = step.checked_mul(len.max(1))?;
    }
    Some(steps)
}

/// The place of an index, counted in the units of the steps.
pub(super) fn place(index: &[u64], steps: &[u64]) -> u64 {
    index.iter().zip(steps).map(|(i, step)| i * step).sum()
}

/// One dimension of a copy.
#[derive(Clone, Copy, Debug)]
struct Axis {
    len: u64,
    from: u64,
    to: u64,
}

/// Calls `run` with place in the source, place in the destination and length, all in
/// bytes, for every run of a box that is one in both; in the order of the source, so that
/// it can be read from front to back.
pub(super) fn runs<E>(
    lens: &[u64],
    item_len: u64,
    from_steps: &[u64],
    to_steps: &[u64],
    run: &mut impl FnMut(u64, u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut axes: Vec<Axis> = (lens.iter().zip(from_steps).zip(to_steps))
        .filter(|((len, _), _)| **len != 1)
        .map(|((&len, &from), &to)| Axis { len, from, to })
        .collect();
    if axes.iter().any(|axis| axis.len == 0) {
        return Ok(());
    }
    axes.sort_by_key(|axis| std::cmp::Reverse(axis.from));
    let mut merged: Vec<Axis> = Vec::with_capacity(axes.len());
    for axis in axes {
        match merged.last_mut() {
            Some(outer) if outer.from == axis.from * axis.len && outer.to == axis.to * axis.len => {
                *outer = Axis {
                    len: outer.len * axis.len,
                    ..axis
                };
            }
            _ => merged.push(axis),
        }
    }
    let run_len = match merged.last() {
        Some(axis) if axis.from == item_len && axis.to == item_len => {
            let len = axis.len * item_len;
            merged.pop();
            len
        }
        _ => item_len,
    };
    walk(&merged, 0, 0, &mut |from, to| run(from, to, run_len))
}

fn walk<E>(
    axes: &[Axis],
    from: u64,
    to: u64,
    each: &mut impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    let Some((axis, rest)) = axes.split_first() else {
        return each(from, to);
    };
    for i in 0..axis.len {
        walk(rest, from + i * axis.from, to + i * axis.to, each)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_boxes_of_a_run_are_its_elements_in_order(
            shape in proptest::collection::vec(1u64..5, 0..5),
            a in 0u64..700,
            b in 0u64..700,
        ) {
            let count: u64 = shape.iter().product();
            let (first, end) = (a.min(b) % (count + 1), a.max(b) % (count + 1));
            let (first, end) = (first.min(end), first.max(end));
            let steps = steps(&shape, 1).unwrap();
            let (mut found, mut box_count) = (Vec::new(), 0);
            cut(&shape, first, end, &mut |start, lens| {
                box_count += 1;
                let base = place(start, &steps);
                runs(lens, 1, &steps, &steps, &mut |from, to, len| {
                    assert_eq!(from, to);
                    found.extend(base + from..base + from + len);
                    Ok::<_, ()>(())
                })
            }).unwrap();
            prop_assert_eq!(found, (first..end).collect::<Vec<_>>());
            prop_assert!(box_count <= 2 * shape.len().max(1));
        }

        #[test]
        fn a_transposed_box_keeps_every_element(
            shape in proptest::collection::vec(1u64..5, 1..5),
            by in any::<usize>(),
        ) {
            let mut turned: Vec<usize> = (0..shape.len()).collect();
            turned.rotate_left(by % shape.len());
            let source_shape: Vec<u64> = turned.iter().map(|&axis| shape[axis]).collect();
            let source_steps = steps(&source_shape, 4).unwrap();
            let mut from_steps = vec![0; shape.len()];
            for (position, &axis) in turned.iter().enumerate() {
                from_steps[axis] = source_steps[position];
            }
            let to_steps = steps(&shape, 4).unwrap();
            let count: u64 = shape.iter().product();
            let mut seen = vec![None; count as usize];
            let mut last = None;
            runs(&shape, 4, &from_steps, &to_steps, &mut |from, to, len| {
                assert!(last < Some(from), "the source is read from front to back");
                last = Some(from);
                for k in 0..len / 4 {
                    seen[(to / 4 + k) as usize] = Some(from / 4 + k);
                }
                Ok::<_, ()>(())
            }).unwrap();
            for (at, from) in seen.into_iter().enumerate() {
                let index: Vec<u64> = to_steps.iter().zip(&shape)
                    .map(|(step, len)| at as u64 * 4 / step % len).collect();
                prop_assert_eq!(from, Some(place(&index, &from_steps) / 4));
            }
        }
    }
}
