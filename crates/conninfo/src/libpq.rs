//! The calls to libpq. Each copies what it gets and frees it again.

use std::ffi::{CStr, c_char};
use std::ptr;

use pq_sys::{ConnStatusType, PGPing, PGVerbosity, PQconninfoOption};

use crate::Parameter;

/// Returns the parameters that `text` sets, or `None` if libpq can't read it.
pub(crate) fn parse(text: &CStr) -> Option<Vec<Parameter>> {
    // SAFETY: `text` is NUL-terminated and outlives the call. A null `errmsg` is allowed.
    let options = unsafe { pq_sys::PQconninfoParse(text.as_ptr(), ptr::null_mut()) };
    // SAFETY: libpq returned `options`, and nothing else has them.
    unsafe { take(options) }
}

/// Returns all parameters as a connection attempt would use them. Sends nothing if libpq finds a
/// parameter of `text` invalid.
pub(crate) fn resolve(text: &CStr) -> Option<Vec<Parameter>> {
    // SAFETY: `text` is NUL-terminated and outlives the call.
    let connection = unsafe { pq_sys::PQconnectStart(text.as_ptr()) };
    // SAFETY: `connection` is null, which both functions accept, or valid and freed only here. The
    // options are a copy that nothing else has.
    unsafe {
        let options = take(pq_sys::PQconninfo(connection));
        pq_sys::PQfinish(connection);
        options
    }
}

/// Tries to connect, and returns libpq's message with SQLSTATEs, or `None` if the server accepts.
pub(crate) fn refusal(text: &CStr) -> Option<String> {
    // SAFETY: `text` is NUL-terminated and outlives the call.
    let connection = unsafe { pq_sys::PQconnectStart(text.as_ptr()) };
    // SAFETY: `connection` is null, which all these functions accept, or valid and freed only here.
    // The message is NUL-terminated and copied before it is freed with the connection.
    unsafe {
        pq_sys::PQsetErrorVerbosity(connection, PGVerbosity::PQERRORS_VERBOSE);
        // Connects anew and waits, but keeps the verbosity.
        pq_sys::PQreset(connection);
        let accepted = pq_sys::PQstatus(connection) == ConnStatusType::CONNECTION_OK;
        let message = string(pq_sys::PQerrorMessage(connection)).unwrap_or_default();
        pq_sys::PQfinish(connection);
        (!accepted).then_some(message)
    }
}

/// Returns whether libpq can use the parameters of `text`. Asks the server if so.
pub(crate) fn is_valid(text: &CStr) -> bool {
    // SAFETY: `text` is NUL-terminated and outlives the call.
    unsafe { pq_sys::PQping(text.as_ptr()) != PGPing::PQPING_NO_ATTEMPT }
}

/// Copies the options that have a value, and frees them.
///
/// # Safety
/// `options` is null or an array of libpq's that nothing else uses.
unsafe fn take(options: *mut PQconninfoOption) -> Option<Vec<Parameter>> {
    if options.is_null() {
        return None;
    }
    let mut parameters = Vec::new();
    let mut next = options;
    // SAFETY: libpq ends the array with an option without a keyword; its strings are null or
    // NUL-terminated, and live until the array is freed, which happens once.
    unsafe {
        while let Some(keyword) = string((*next).keyword) {
            if let Some(value) = string((*next).val) {
                parameters.push(Parameter {
                    keyword,
                    value,
                    // libpq's mark for values that a form hides.
                    is_secret: string((*next).dispchar).is_some_and(|mark| mark == "*"),
                });
            }
            next = next.add(1);
        }
        pq_sys::PQconninfoFree(options);
    }
    Some(parameters)
}

/// # Safety
/// `text` is null or NUL-terminated.
unsafe fn string(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: `text` is NUL-terminated.
    let text = unsafe { CStr::from_ptr(text) };
    Some(text.to_string_lossy().into_owned())
}
