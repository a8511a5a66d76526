//! The few Python literals that a header consists of. No recursion: nothing in
//! a valid header nests deeper than a tuple in a dict.

use super::NpyError;

/// Most dimensions that any numpy supports.
const MAX_DIMENSIONS: usize = 64;

/// `(descr, fortran_order, shape)` of a dict literal; `utf8` chooses between
/// UTF-8 and Latin-1.
pub(super) fn parse_dict(bytes: &[u8], utf8: bool) -> Result<(String, bool, Vec<u64>), NpyError> {
    let mut p = Parser { bytes, at: 0, utf8 };
    let (mut descr, mut fortran_order, mut shape) = (None, None, None);
    p.skip_space();
    p.expect(b'{', "expected '{'")?;
    while !p.take(b'}') {
        let key_at = p.at;
        let key = p.string()?;
        p.expect(b':', "expected ':'")?;
        let again = match key.as_str() {
            "descr" => descr.replace(p.descr()?).is_some(),
            "fortran_order" => fortran_order.replace(p.boolean()?).is_some(),
            "shape" => shape.replace(p.tuple()?).is_some(),
            _ => return Err(p.error_at(key_at, "a key is not descr, fortran_order or shape")),
        };
        if again {
            return Err(p.error_at(key_at, "a key occurs twice"));
        }
        if !p.take(b',') && p.peek() != Some(b'}') {
            return Err(p.error("expected ',' or '}'"));
        }
    }
    if p.at != bytes.len() {
        return Err(p.error("text after the dict"));
    }
    match (descr, fortran_order, shape) {
        (Some(descr), Some(fortran_order), Some(shape)) => Ok((descr, fortran_order, shape)),
        (None, ..) => Err(p.error("the key descr is missing")),
        (_, None, _) => Err(p.error("the key fortran_order is missing")),
        (.., None) => Err(p.error("the key shape is missing")),
    }
}

/// Stands on a token at all times: every method skips the space behind what it
/// took.
struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    utf8: bool,
}

impl Parser<'_> {
    fn error(&self, why: &'static str) -> NpyError {
        self.error_at(self.at, why)
    }

    fn error_at(&self, at: usize, why: &'static str) -> NpyError {
        NpyError::Syntax { at: at as u64, why }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        if found {
            self.at += 1;
            self.skip_space();
        }
        found
    }

    fn expect(&mut self, byte: u8, why: &'static str) -> Result<(), NpyError> {
        if self.take(byte) {
            Ok(())
        } else {
            Err(self.error(why))
        }
    }

    fn descr(&mut self) -> Result<String, NpyError> {
        // A list of fields, or a tuple of base type and subarray shape.
        if matches!(self.peek(), Some(b'[' | b'(')) {
            return Err(NpyError::Structured);
        }
        self.string()
    }

    fn boolean(&mut self) -> Result<bool, NpyError> {
        for (word, value) in [(&b"True"[..], true), (&b"False"[..], false)] {
            if self.bytes[self.at..].starts_with(word) {
                self.at += word.len();
                self.skip_space();
                return Ok(value);
            }
        }
        Err(self.error("expected True or False"))
    }

    fn string(&mut self) -> Result<String, NpyError> {
        // Python 2 wrote u'...' and b'...'.
        if matches!(self.peek(), Some(b'u' | b'b')) {
            self.at += 1;
        }
        let start = self.at;
        let quote = match self.peek() {
            Some(quote @ (b'\'' | b'"')) => quote,
            _ => return Err(self.error("expected a string")),
        };
        self.at += 1;
        let mut raw = Vec::new();
        loop {
            let byte = self
                .peek()
                .ok_or_else(|| self.error_at(start, "the string has no end"))?;
            self.at += 1;
            match byte {
                b'\\' => match self.peek() {
                    Some(escaped @ (b'\\' | b'\'' | b'"')) => {
                        raw.push(escaped);
                        self.at += 1;
                    }
                    _ => return Err(self.error("an escape other than \\\\, \\' and \\\"")),
                },
                b'\n' => return Err(self.error_at(start, "the string has no end")),
                byte if byte == quote => break,
                byte => raw.push(byte),
            }
        }
        self.skip_space();
        if self.utf8 {
            String::from_utf8(raw).map_err(|_| self.error_at(start, "the string is not utf-8"))
        } else {
            Ok(raw.into_iter().map(char::from).collect())
        }
    }

    fn tuple(&mut self) -> Result<Vec<u64>, NpyError> {
        let start = self.at;
        self.expect(b'(', "expected a tuple")?;
        let mut items = Vec::new();
        let mut comma_count = 0;
        while !self.take(b')') {
            if items.len() == MAX_DIMENSIONS {
                return Err(self.error_at(start, "more than 64 dimensions"));
            }
            items.push(self.integer()?);
            if self.take(b',') {
                comma_count += 1;
            } else if self.peek() != Some(b')') {
                return Err(self.error("expected ',' or ')'"));
            }
        }
        // Python reads `(3)` as a number.
        if items.len() == 1 && comma_count == 0 {
            return Err(self.error_at(start, "a tuple of one needs a comma"));
        }
        Ok(items)
    }

    fn integer(&mut self) -> Result<u64, NpyError> {
        let start = self.at;
        let mut value = 0u64;
        while let Some(digit @ b'0'..=b'9') = self.peek() {
            value = value
                .checked_mul(10)
                .and_then(|v| v.checked_add(u64::from(digit - b'0')))
                .ok_or_else(|| self.error_at(start, "a dimension does not fit in 64 bits"))?;
            self.at += 1;
        }
        if self.at == start {
            return Err(self.error("expected a number that is not negative"));
        }
        // Python 2 marked long integers.
        if self.peek() == Some(b'L') {
            self.at += 1;
        }
        self.skip_space();
        Ok(value)
    }
}
